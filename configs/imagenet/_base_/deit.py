# The paper's recipe for DeiT, CeiT and PVTv2, which is DeiT's: 300 epochs, batch 1024, AdamW with
# weight decay 0.05, learning rate 1e-3 on a cosine after 5 epochs of warm-up, RandAugment, repeated
# augmentation, label smoothing 0.1, Mixup 0.8, CutMix 1.0, random erasing; stochastic depth 0.1.
_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "../../_base_/classifier.py",
]

model = dict(
    # The released start: layer attentions at full strength.
    backbone=dict(drop_path_rate=0.1, zero_init_mrla=False),
    neck=None,
    head=dict(
        type="VisionTransformerClsHead",
        num_classes=1000,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
    init_cfg=[
        dict(type="TruncNormal", layer="Linear", std=0.02),
        dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
    ],
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
)

train_dataloader = dict(
    batch_size=128, sampler=dict(_delete_=True, type="RepeatAugSampler", num_repeats=3)
)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader

# Norms, biases and lambda (flat) are not decayed.
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            ".cls_token": dict(decay_mult=0.0),
            ".dist_token": dict(decay_mult=0.0),
            ".pos_embed": dict(decay_mult=0.0),
        },
    )
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5),
]

train_cfg = dict(_delete_=True, type="mmrla.ResumableTrainLoop", max_epochs=300, val_interval=1)
