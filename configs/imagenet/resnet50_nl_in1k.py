# ResNet-50 + 1 non-local block, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(
        depth=50,
        mrla_drop_path_rate=None,
        layer_attention=None,
        plugins=[
            dict(
                cfg=dict(type="NonLocal2d", use_scale=False),
                # Before the last residual block of the third stage.
                stages=(False, False, True, False),
                blocks=(-2,),
                position="after_block",
            )
        ],
    ),
)
