# Faster R-CNN, ResNet-101 + MRLA-light, COCO, 1x schedule.
_base_ = "./faster_rcnn_r50_mrla_1x.py"

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint="torchvision://resnet101")))
