# ResNet-56 of basic blocks + dynamic layer attention, light, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(
    backbone=dict(depth=56, layer_attention=dict(type="DLALight", head_channels=32, reduction=4))
)
