# ResNet-56 of bottlenecks + 1 non-local block, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

# Before the last residual block of the last but one stage, as in ResNet-50.
where = dict(stages=(False, True, False), blocks=(-2,), position="after_block")
plugins = [dict(cfg=dict(type="NonLocal2d", use_scale=False), **where)]
model = dict(backbone=dict(depth=56, layer_attention=None, plugins=plugins))
