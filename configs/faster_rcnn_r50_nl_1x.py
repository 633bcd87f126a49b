# Faster R-CNN, ResNet-50 + 1 non-local block, COCO, 1x schedule.
_base_ = "./faster_rcnn_r50_1x.py"

model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(type="NonLocal2d", use_scale=False),
                # Before the last residual block of the third stage.
                stages=(False, False, True, False),
                blocks=(-2,),
                position="after_block",
            )
        ],
    )
)
