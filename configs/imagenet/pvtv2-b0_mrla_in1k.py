# PVTv2-B0 + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/pvtv2.py"

model = dict(
    backbone=dict(arch="b0", layer_attention=dict(type="MRLALight", head_channels=16)),
    head=dict(in_channels=256),
)
