# plain ResNet-50: the baseline on the same code, ImageNet-1k, on the recipe of MRLA's paper.
_base_ = "./_base_/resnet.py"

model = dict(backbone=dict(depth=50, layer_attention=None, mrla_drop_path_rate=None))
