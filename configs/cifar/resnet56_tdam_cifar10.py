# ResNet-56 of basic blocks + TDAM, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(
    backbone=dict(
        depth=56,
        layer_attention=None,
        plugins=[
            dict(
                cfg=dict(type="mmrla.TDAM"),
                # The last two stages.
                stages=(False, True, True),
                position="after_conv2",
            )
        ],
    ),
)
