# Changes PVTv2-B0 to B1.
pvtv2_b1 = dict(
    backbone=dict(
        arch="b1",
        init_cfg=dict(
            checkpoint="https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b1.pth"
        ),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
