# A.3: ResNet-50 + linear RLA, channel-wise.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="LinearRLA", head_channels=1)))
