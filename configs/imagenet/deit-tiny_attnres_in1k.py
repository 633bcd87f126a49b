# DeiT-T + AttnRes, ImageNet-1k, DeiT's recipe.
_base_ = "./deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="AttnRes")))
