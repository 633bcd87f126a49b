# Mask R-CNN, PVTv2-B1 + MRLA-light, COCO, 1x schedule with PVTv2's optimizer.
_base_ = "./mask_rcnn_pvtv2-b0_mrla_1x.py"

model = dict(
    backbone=dict(
        arch="b1",
        init_cfg=dict(
            checkpoint="https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b1.pth"
        ),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
