# Table 12 (a): ResNet-50 + a 3x3 DWConv and a norm after each layer, with stochastic depth.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="DWConv")))
