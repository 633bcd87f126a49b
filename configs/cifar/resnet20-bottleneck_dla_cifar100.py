# ResNet-20 of bottlenecks + dynamic layer attention, light, CIFAR-100, 180 epochs.
_base_ = "./_base_/cifar100_bottleneck.py"

attention = dict(type="DLALight", head_channels=16, reduction=4)
model = dict(backbone=dict(depth=20, layer_attention=attention))
