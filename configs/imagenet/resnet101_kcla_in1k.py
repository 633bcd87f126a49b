# ResNet-101 + key-correlated layer attention (KCLA), ImageNet-1k, on the recipe of MRLA's paper.
_base_ = "./resnet50_kcla_in1k.py"

model = dict(backbone=dict(depth=101))
