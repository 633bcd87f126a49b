# ResNet-56 of bottlenecks + attention-augmented convolutions (AA), CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

# The 3x3 convolutions of the last two stages, of 32 and 64 channels; heads as with basic blocks.
aa = dict(type="mmrla.AttentionAugmentedConv", num_heads=4, value_ratio=0.25)
plugins = [
    dict(cfg=dict(size=16, **aa), stages=(False, True, False), position="conv2"),
    dict(cfg=dict(size=8, **aa), stages=(False, False, True), position="conv2"),
]
model = dict(backbone=dict(depth=56, layer_attention=None, plugins=plugins))
