# The recipe of small detectors that train on a CPU: AdamW on a cosine after a warm-up. A config
# takes what it needs with _base_.pop(...) and sets the length of the cosine.
adamw = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.001, weight_decay=0.01),
    clip_grad=dict(max_norm=10),
)
warm_cosine = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(
        type="CosineAnnealingLR", eta_min=1e-5, begin=0, by_epoch=True, convert_to_iter_based=True
    ),
]
