# plain ResNet-56 of bottlenecks: the baseline on the same code, CIFAR-100, 180 epochs.
_base_ = "./_base_/cifar100_bottleneck.py"

model = dict(backbone=dict(depth=56, layer_attention=None))
