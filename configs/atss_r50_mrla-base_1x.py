# ATSS, ResNet-50 + MRLA-base, COCO, 1x schedule.
_base_ = "./atss_r50_mrla_1x.py"

model = dict(backbone=dict(layer_attention=dict(type="MRLABase", head_channels=16)))
