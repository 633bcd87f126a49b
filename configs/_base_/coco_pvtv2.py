# PVTv2 + MRLA-light for COCO detectors, from the authors' ImageNet weights; MRLA grows in.
_base_ = "./coco.py"

on_coco = dict(
    model=dict(
        backbone=dict(
            _delete_=True,
            type="mmrla.MRLAPyramidVisionTransformerV2",
            arch="b0",
            layer_attention=dict(type="MRLALight", head_channels=16),
            mrla_drop_path_rate=None,  # the block's own
            init_cfg=dict(
                type="mmrla.WarmStart",
                checkpoint="https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b0.pth",
            ),
        ),
        neck=dict(in_channels=[32, 64, 160, 256]),
    ),
    optim_wrapper=dict(optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, weight_decay=0.0001)),
)
