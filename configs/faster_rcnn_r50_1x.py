# Faster R-CNN, plain ResNet-50, COCO, 1x schedule: the baseline on the same code.
_base_ = "./faster_rcnn_r50_mrla_1x.py"

model = dict(backbone=dict(layer_attention=None))
