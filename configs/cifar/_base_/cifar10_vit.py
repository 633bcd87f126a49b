# CIFAR-10 with a small ViT (patches of 4 pixels, 8 blocks, 64 channels): the images and crops of
# cifar10.py, 200 epochs of AdamW, learning rate 1e-3 on a cosine after 10 epochs of warm-up.
_base_ = "./cifar10.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmrla.MRLAVisionTransformer",
        arch=dict(embed_dims=64, num_layers=8, num_heads=2, feedforward_channels=256),
        img_size=32,
        patch_size=4,
    ),
    neck=None,
    head=dict(_delete_=True, type="VisionTransformerClsHead", num_classes=10, in_channels=64),
    init_cfg=[
        dict(type="TruncNormal", layer="Linear", std=0.02),
        dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
    ],
)

# Norms, biases, and the queries and weights of layer attentions (flat) are not decayed.
optim_wrapper = dict(
    _delete_=True,
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={".cls_token": dict(decay_mult=0.0), ".pos_embed": dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=10, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=10),
]
train_cfg = dict(max_epochs=200)
