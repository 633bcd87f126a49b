# ResNet-56 of basic blocks + MRLA-base, CIFAR-100, 180 epochs.
_base_ = "./_base_/cifar100.py"

model = dict(backbone=dict(depth=56, layer_attention=dict(type="MRLABase", head_channels=32)))
