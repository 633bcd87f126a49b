# RetinaNet, ResNet-50 + bridge attention (BA), COCO, 1x schedule.
_base_ = "./retinanet_r50_1x.py"

model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type="mmrla.BridgeAttention"), position="after_conv3")],
    )
)
