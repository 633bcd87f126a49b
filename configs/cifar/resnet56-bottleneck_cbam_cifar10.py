# ResNet-56 of bottlenecks + CBAM, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

plugins = [dict(cfg=dict(type="mmrla.CBAM"))]
model = dict(backbone=dict(depth=56, layer_attention=None, plugins=plugins))
