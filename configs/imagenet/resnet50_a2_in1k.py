# ResNet-50 + double attention (A2), ImageNet-1k, the paper's recipe.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(
        depth=50,
        mrla_drop_path_rate=None,
        layer_attention=None,
        plugins=[
            # Two blocks in the second stage, three in the third, before its last residual blocks.
            dict(
                cfg=dict(type="mmrla.DoubleAttention"),
                stages=(False, True, False, False),
                blocks=(-3, -2),
                position="after_block",
            ),
            dict(
                cfg=dict(type="mmrla.DoubleAttention"),
                stages=(False, False, True, False),
                blocks=(-4, -3, -2),
                position="after_block",
            ),
        ],
    ),
)
