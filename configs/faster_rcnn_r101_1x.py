# Faster R-CNN, plain ResNet-101, COCO, 1x schedule: the baseline on the same code.
_base_ = "./faster_rcnn_r101_mrla_1x.py"

model = dict(backbone=dict(layer_attention=None))
