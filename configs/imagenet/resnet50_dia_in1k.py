# ResNet-50 + DIANet's unit, ImageNet-1k, on the recipe of MRLA's paper.
_base_ = "./_base_/resnet.py"

model = dict(backbone=dict(
    depth=50, layer_attention=dict(type="DIAUnit", reduction=20),
    mrla_drop_path_rate=None,  # it adds no branch that could be dropped
))  # fmt: skip
