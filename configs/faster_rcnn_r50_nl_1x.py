# Faster R-CNN, ResNet-50 + 1 non-local block, COCO, 1x schedule.
_base_ = ["./faster_rcnn_r50_1x.py", "./_base_/within_layer.py"]

model = dict(backbone=dict(plugins=_base_.pop("within_layer").nl))
