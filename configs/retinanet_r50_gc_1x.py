# RetinaNet, ResNet-50 + GC blocks, COCO, 1x schedule.
_base_ = "./retinanet_r50_1x.py"

model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(type="ContextBlock", ratio=1 / 16),
                stages=(False, True, True, True),
                position="after_conv3",
            )
        ],
    )
)
