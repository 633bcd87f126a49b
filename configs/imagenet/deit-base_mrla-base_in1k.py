# DeiT-B + MRLA-base, ImageNet-1k, the paper's recipe.
_base_ = "./deit-base_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="MRLABase", head_channels=16)))
