# DeiT-S + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(arch="deit-small"), head=dict(in_channels=384))
