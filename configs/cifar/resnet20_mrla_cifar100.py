# ResNet-20 of basic blocks + MRLA-light, CIFAR-100, 180 epochs.
_base_ = "./_base_/cifar100.py"

model = dict(backbone=dict(depth=20, layer_attention=dict(type="MRLALight", head_channels=32)))
