# CIFAR-10 with basic blocks (6 n + 2 layers, stages of 16, 32 and 64 channels): 180 epochs, batch
# 128, SGD 0.1 divided by 10 at epochs 100 and 150, crops of images padded by 4 pixels and flips.
# DLA and KCLA train bottlenecks with the same recipe: cifar10_bottleneck.py.
_base_ = [
    "mmpretrain::_base_/datasets/cifar10_bs16.py",
    "mmpretrain::_base_/schedules/cifar10_bs128.py",
    "mmpretrain::_base_/default_runtime.py",
]

# Makes mmcv's operations available where mmcv was installed without its compiled extension.
custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="mmrla.MRLAResNetCIFAR"),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=64,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
)

# data_root: cifar-10-batches-py/ or {train,test}/<class>/*.jpg
dataset = dict(type="mmrla.CIFAR10", data_root="data/cifar10/")
train_dataloader = dict(batch_size=128, dataset=dataset)
val_dataloader = dict(batch_size=128, dataset=dataset)
test_dataloader = val_dataloader

# A run that was killed goes on with --resume as if nothing had happened.
train_cfg = dict(_delete_=True, type="mmrla.ResumableTrainLoop", max_epochs=180, val_interval=1)
default_hooks = dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook"))
param_scheduler = dict(milestones=[100, 150])
