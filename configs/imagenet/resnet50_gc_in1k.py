# ResNet-50 + GC blocks, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(
        depth=50,
        mrla_drop_path_rate=None,
        layer_attention=None,
        plugins=[
            dict(
                cfg=dict(type="ContextBlock", ratio=1 / 16),
                stages=(False, True, True, True),
                position="after_conv3",
            )
        ],
    ),
)
