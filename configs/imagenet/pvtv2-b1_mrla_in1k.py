# PVTv2-B1 + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./pvtv2-b0_mrla_in1k.py"

model = dict(backbone=dict(arch="b1"), head=dict(in_channels=512))
