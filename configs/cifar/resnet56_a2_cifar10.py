# ResNet-56 of basic blocks + double attention (A2), CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(
    backbone=dict(
        depth=56,
        layer_attention=None,
        plugins=[
            # Two blocks in the second stage, three in the third.
            dict(
                cfg=dict(type="mmrla.DoubleAttention"),
                stages=(False, True, False),
                blocks=(-3, -2),
                position="after_block",
            ),
            dict(
                cfg=dict(type="mmrla.DoubleAttention"),
                stages=(False, False, True),
                blocks=(-4, -3, -2),
                position="after_block",
            ),
        ],
    ),
)
