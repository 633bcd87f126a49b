# plain ResNet-110 of basic blocks: the baseline on the same code, CIFAR-100, 180 epochs.
_base_ = "./_base_/cifar100.py"

model = dict(backbone=dict(depth=110, layer_attention=None))
