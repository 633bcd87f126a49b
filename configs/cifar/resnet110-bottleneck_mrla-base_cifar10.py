# ResNet-110 of bottlenecks + MRLA-base, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

model = dict(backbone=dict(depth=110, layer_attention=dict(type="MRLABase", head_channels=32)))
