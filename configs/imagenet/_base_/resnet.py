# The paper's recipe for ResNets: 100 epochs, batch 256, SGD 0.1 divided by 10 every 30 epochs, the
# released command's 3 epochs of warm-up; stochastic depth 0.2 on the layer attention alone.
_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs32.py",
    "mmpretrain::_base_/schedules/imagenet_bs256.py",
    "mmpretrain::_base_/default_runtime.py",
]

# Makes mmcv's operations available where mmcv was installed without its compiled extension.
custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    # The released start: layer attentions at full strength.
    backbone=dict(type="mmrla.MRLAResNet", mrla_drop_path_rate=0.2, zero_init_mrla=False),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=1000, in_channels=2048),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, end=3, convert_to_iter_based=True),
    dict(type="MultiStepLR", by_epoch=True, milestones=[30, 60, 90], gamma=0.1),
]

# A run that was killed goes on with --resume as if nothing had happened.
train_cfg = dict(_delete_=True, type="mmrla.ResumableTrainLoop", max_epochs=100, val_interval=1)
default_hooks = dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook"))
