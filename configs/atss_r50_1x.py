# ATSS, plain ResNet-50, COCO, 1x schedule: the baseline on the same code.
_base_ = "./atss_r50_mrla_1x.py"

model = dict(backbone=dict(layer_attention=None))
