# CeiT-S + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./ceit-tiny_mrla_in1k.py"

model = dict(backbone=dict(arch="small"), head=dict(in_channels=384))
