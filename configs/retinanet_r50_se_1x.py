# RetinaNet, ResNet-50 + SE, COCO, 1x schedule.
_base_ = "./retinanet_r50_1x.py"

model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type="mmrla.SE"), position="after_conv3")],
    )
)
