# B.4: ResNet-50 + MRLA-base without stochastic depth.
_base_ = "../imagenet/resnet50_mrla-base_in1k.py"

model = dict(backbone=dict(mrla_drop_path_rate=0.0))
