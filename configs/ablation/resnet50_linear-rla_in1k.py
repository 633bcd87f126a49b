# A.3: ResNet-50 + linear RLA of several heads, whose state is d_k = 32 times a value.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="LinearRLA", head_channels=32)))
