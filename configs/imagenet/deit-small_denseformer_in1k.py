# DeiT-S + DenseFormer, the static control of AttnRes, ImageNet-1k, DeiT's recipe.
_base_ = "./deit-small_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="DenseFormer")))
