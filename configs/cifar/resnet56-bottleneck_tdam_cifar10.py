# ResNet-56 of bottlenecks + TDAM, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

# The last two stages.
plugins = [dict(cfg=dict(type="mmrla.TDAM"), stages=(False, True, True))]
model = dict(backbone=dict(depth=56, layer_attention=None, plugins=plugins))
