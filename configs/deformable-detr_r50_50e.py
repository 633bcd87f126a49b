# Deformable DETR, plain ResNet-50, COCO, 50 epochs: the baseline on the same code.
_base_ = "./deformable-detr_r50_mrla_50e.py"

model = dict(backbone=dict(layer_attention=None))
