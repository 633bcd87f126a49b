# Table 11: DeiT-T + a 3x3 DWConv behind each block.
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="DWConv")))
