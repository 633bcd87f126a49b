# Table 4 (b): ResNet-50 + MRLA-light entirely without previous information.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(recurrence=None)))
