# Table 4 (e): ResNet-50 + MRLA-light with the identity connection, lambda = 1.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(fixed_lambda=1)))
