# ResNet-56 of basic blocks + attention-augmented convolutions (AA), CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(
    backbone=dict(
        depth=56,
        layer_attention=None,
        plugins=[
            # The second 3x3 convolutions of the last two stages. With 32 channels, ImageNet's 8
            # heads and ratio would leave the values less than a channel a head.
            dict(
                cfg=dict(
                    type="mmrla.AttentionAugmentedConv", num_heads=4, value_ratio=0.25, size=16
                ),
                stages=(False, True, False),
                position="conv2",
            ),
            dict(
                cfg=dict(
                    type="mmrla.AttentionAugmentedConv", num_heads=4, value_ratio=0.25, size=8
                ),
                stages=(False, False, True),
                position="conv2",
            ),
        ],
    ),
)
