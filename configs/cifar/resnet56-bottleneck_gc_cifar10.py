# ResNet-56 of bottlenecks + GC blocks, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

plugins = [dict(cfg=dict(type="ContextBlock", ratio=1 / 16))]
model = dict(backbone=dict(depth=56, layer_attention=None, plugins=plugins))
