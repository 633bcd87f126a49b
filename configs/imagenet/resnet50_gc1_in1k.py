# ResNet-50 + 1 GC block, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(
        depth=50,
        mrla_drop_path_rate=None,
        layer_attention=None,
        plugins=[
            dict(
                cfg=dict(type="ContextBlock", ratio=1 / 16),
                # Before the last residual block of the third stage.
                stages=(False, False, True, False),
                blocks=(-2,),
                position="after_block",
            )
        ],
    ),
)
