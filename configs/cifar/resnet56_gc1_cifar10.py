# ResNet-56 of basic blocks + 1 GC block, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(
    backbone=dict(
        depth=56,
        layer_attention=None,
        plugins=[
            dict(
                cfg=dict(type="ContextBlock", ratio=1 / 4),
                # Before the last residual block of the last but one stage, as in ResNet-50.
                stages=(False, True, False),
                blocks=(-2,),
                position="after_block",
            )
        ],
    ),
)
