# Mask R-CNN, ResNet-50 + GC blocks, COCO, 1x schedule.
_base_ = ["./mask_rcnn_r50_1x.py", "./_base_/within_layer.py"]

model = dict(backbone=dict(plugins=_base_.pop("within_layer").gc))
