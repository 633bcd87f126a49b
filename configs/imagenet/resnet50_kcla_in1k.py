# ResNet-50 + key-correlated layer attention (KCLA), ImageNet-1k, on the recipe of MRLA's paper.
_base_ = "./_base_/resnet.py"

model = dict(backbone=dict(
    depth=50, layer_attention=dict(type="KCLA", head_channels=64),
    mrla_act_cfg=dict(type="ReLU"),
))  # fmt: skip
