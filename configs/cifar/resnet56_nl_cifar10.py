# ResNet-56 of basic blocks + 1 non-local block, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(
    backbone=dict(
        depth=56,
        layer_attention=None,
        plugins=[
            dict(
                cfg=dict(type="NonLocal2d", use_scale=False),
                # Before the last residual block of the last but one stage, as in ResNet-50.
                stages=(False, True, False),
                blocks=(-2,),
                position="after_block",
            )
        ],
    ),
)
