# PVTv2-B1 + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/pvtv2.py"

model = dict(
    backbone=dict(
        arch="b1",
        layer_attention=dict(type="MRLALight", head_channels=16),
    ),
    head=dict(in_channels=512),
)
