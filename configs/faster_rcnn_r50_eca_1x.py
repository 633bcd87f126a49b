# Faster R-CNN, ResNet-50 + ECA, COCO, 1x schedule.
_base_ = "./faster_rcnn_r50_1x.py"

model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type="mmrla.ECA"), position="after_conv3")],
    )
)
