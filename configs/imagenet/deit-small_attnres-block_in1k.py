# DeiT-S + Block AttnRes, six blocks of 4 sub-layers, ImageNet-1k, DeiT's recipe.
_base_ = "./deit-small_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="AttnRes", block_size=4)))
