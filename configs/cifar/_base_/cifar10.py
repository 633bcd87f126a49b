# CIFAR-10 with basic blocks (6 n + 2 layers, stages of 16, 32 and 64 channels): 180 epochs, batch
# 128, SGD 0.1 divided by 10 at epochs 100 and 150, crops of images padded by 4 pixels and flips.
# DLA and KCLA train bottlenecks with the same recipe: cifar10_bottleneck.py.
_base_ = [
    "mmpretrain::_base_/datasets/cifar10_bs16.py",
    "mmpretrain::_base_/schedules/cifar10_bs128.py",
    "../../_base_/classifier.py",
]

model = dict(
    backbone=dict(type="mmrla.MRLAResNetCIFAR"),
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

train_cfg = dict(_delete_=True, type="mmrla.ResumableTrainLoop", max_epochs=180, val_interval=1)
param_scheduler = dict(milestones=[100, 150])
