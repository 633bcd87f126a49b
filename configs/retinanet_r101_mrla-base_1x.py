# RetinaNet, ResNet-101 + MRLA-base, COCO, 1x schedule.
_base_ = "./retinanet_r101_mrla_1x.py"

model = dict(backbone=dict(layer_attention=dict(type="MRLABase", head_channels=16)))
