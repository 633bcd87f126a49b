# DETR, plain ResNet-50, COCO, 150 epochs: the baseline on the same code.
_base_ = "./detr_r50_mrla_150e.py"

model = dict(backbone=dict(layer_attention=None))
