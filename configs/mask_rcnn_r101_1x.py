# Mask R-CNN, plain ResNet-101, COCO, 1x schedule: the baseline on the same code.
_base_ = "./mask_rcnn_r101_mrla_1x.py"

model = dict(backbone=dict(layer_attention=None))
