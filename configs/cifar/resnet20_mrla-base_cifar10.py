# ResNet-20 of basic blocks + MRLA-base, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(backbone=dict(depth=20, layer_attention=dict(type="MRLABase", head_channels=32)))
