# ResNet-50 + bridge attention (BA), ImageNet-1k, the paper's recipe.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(
        depth=50,
        mrla_drop_path_rate=None,
        layer_attention=None,
        plugins=[dict(cfg=dict(type="mmrla.BridgeAttention"), position="after_conv3")],
    ),
)
