# Like Table 4 (c): DeiT-T + MRLA-light without the 3x3 DWConv; the value is x.
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(value_conv=False)))
