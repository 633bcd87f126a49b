# ResNet-50 + dynamic layer attention, base, ImageNet-1k, on the recipe of MRLA's paper.
_base_ = "./_base_/resnet.py"

model = dict(backbone=dict(
    depth=50, layer_attention=dict(type="DLABase", head_channels=32, reduction=16),
    mrla_act_cfg=dict(type="ReLU"),  # as in the released code
))  # fmt: skip
