# ResNet-56 of basic blocks + TDAM, CIFAR-10, 180 epochs.
_base_ = ["./resnet56_plain_cifar10.py", "./_base_/within_layer.py"]

model = dict(backbone=dict(plugins=_base_.pop("within_layer").tdam))
