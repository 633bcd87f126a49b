# ResNet-56 of bottlenecks + double attention (A2), CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

# Two blocks in the second stage, three in the third.
a2 = dict(cfg=dict(type="mmrla.DoubleAttention"), position="after_block")
plugins = [
    dict(stages=(False, True, False), blocks=(-3, -2), **a2),
    dict(stages=(False, False, True), blocks=(-4, -3, -2), **a2),
]
model = dict(backbone=dict(depth=56, layer_attention=None, plugins=plugins))
