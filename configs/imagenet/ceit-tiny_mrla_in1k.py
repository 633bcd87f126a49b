# CeiT-T + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/deit.py"

model = dict(
    backbone=dict(
        type="mmrla.MRLACeiT",
        arch="tiny",
        layer_attention=dict(type="MRLALight", head_channels=16),
        mrla_drop_path_rate=None,  # the block's own
    ),
    head=dict(in_channels=192),
)
