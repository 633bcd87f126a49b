# Table 4 (f): ResNet-50 + MRLA-light with d_k = 4.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(head_channels=4)))
