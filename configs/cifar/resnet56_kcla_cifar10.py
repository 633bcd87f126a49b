# ResNet-56 of basic blocks + key-correlated layer attention (KCLA), CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(backbone=dict(
    depth=56, layer_attention=dict(type="KCLA", head_channels=16),
    mrla_act_cfg=dict(type="ReLU"),
))  # fmt: skip
