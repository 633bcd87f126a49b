# ResNet-50 + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/resnet.py"

model = dict(backbone=dict(depth=50, layer_attention=dict(type="MRLALight", head_channels=32)))
