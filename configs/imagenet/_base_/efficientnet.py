# The paper's recipe for EfficientNets: 350 epochs, batch 768, RMSProp with a learning rate of 0.048
# times 0.97 every 2.4 epochs, AutoAugment, stochastic depth 0.2 (shared with the layer attention),
# dropout 0.2.
_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64_autoaug.py",
    "mmpretrain::_base_/schedules/imagenet_bs256.py",
    "../../_base_/classifier.py",
]

model = dict(
    backbone=dict(
        type="mmrla.MRLAEfficientNet",
        drop_path_rate=0.2,
        mrla_drop_path_rate=None,  # the layer's own
        zero_init_mrla=False,  # as released
        norm_cfg=dict(type="BN", eps=1e-3, momentum=0.01),
    ),
    head=dict(
        type="mmrla.DropoutLinearClsHead", num_classes=1000, in_channels=1280, dropout_rate=0.2
    ),
)

train_dataloader = dict(batch_size=96)
val_dataloader = dict(batch_size=96)
test_dataloader = val_dataloader

# TensorFlow's RMSProp has its eps of 1e-3 under the root; torch's stands outside.
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type="RMSprop",
        lr=0.048,
        alpha=0.9,
        momentum=0.9,
        eps=0.0316,
        weight_decay=4e-5,
    )
)
# A step at each epoch that begins 2.4 epochs or more after the last; before that timm's usual
# warm-up, which the paper does not mention.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, end=3, convert_to_iter_based=True),
    dict(
        type="MultiStepLR",
        by_epoch=True,
        # Rounded up, without an import: mmengine 0.10.7 takes configs with one for another kind.
        milestones=[int(-(-2.4 * step // 1)) for step in range(1, 146)],
        gamma=0.97,
    ),
]
train_cfg = dict(_delete_=True, type="mmrla.ResumableTrainLoop", max_epochs=350, val_interval=1)
auto_scale_lr = dict(base_batch_size=768)
