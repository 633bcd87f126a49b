# B.4: ResNet-50 + MLA without stochastic depth.
_base_ = "./resnet50_mla_in1k.py"

model = dict(backbone=dict(mrla_drop_path_rate=0.0))
