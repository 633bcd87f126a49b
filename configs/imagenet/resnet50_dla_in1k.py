# ResNet-50 + dynamic layer attention, light, ImageNet-1k, on the recipe of MRLA's paper.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(depth=50, layer_attention=dict(type="DLALight", head_channels=32, reduction=16))
)
