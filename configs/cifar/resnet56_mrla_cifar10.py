# ResNet-56 of basic blocks + MRLA-light, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(backbone=dict(depth=56, layer_attention=dict(type="MRLALight", head_channels=32)))
