# PVTv2 with DeiT's recipe: it has no class token, so its last map is averaged.
_base_ = "./deit.py"

model = dict(
    backbone=dict(
        type="mmrla.MRLAPyramidVisionTransformerV2",
        out_indices=(3,),
        mrla_drop_path_rate=None,  # the block's own
    ),
    neck=dict(_delete_=True, type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead"),
)
