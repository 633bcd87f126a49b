# Table 12c: ResNet-50 + ECA with MRLA's stochastic depth on what ECA puts out, ImageNet-1k.
_base_ = "./resnet50_eca_in1k.py"

model = dict(backbone=dict(drop_path_rate=0.2))
