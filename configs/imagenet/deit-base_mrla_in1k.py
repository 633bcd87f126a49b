# DeiT-B + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/deit.py"

model = dict(
    backbone=dict(
        type="mmrla.MRLAVisionTransformer",
        arch="deit-base",
        layer_attention=dict(type="MRLALight", head_channels=16),
    ),
    head=dict(in_channels=768),
)
