# EfficientNet-B0 + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/efficientnet.py"

model = dict(backbone=dict(arch="b0", layer_attention=dict(type="MRLALight", head_channels=8)))
