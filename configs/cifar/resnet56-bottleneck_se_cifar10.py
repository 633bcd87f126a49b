# ResNet-56 of bottlenecks + SE, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

plugins = [dict(cfg=dict(type="mmrla.SE"))]
model = dict(backbone=dict(depth=56, layer_attention=None, plugins=plugins))
