# Table 4 (c): ResNet-50 + MRLA-light without the 3x3 DWConv; the value is x.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(value_conv=False)))
