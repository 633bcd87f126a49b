# Faster R-CNN, ResNet-50 + SE, COCO, 1x schedule.
_base_ = "./faster_rcnn_r50_1x.py"

model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type="mmrla.SE"), position="after_conv3")],
    )
)
