# ResNet-56 of basic blocks + dynamic layer attention, base, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(backbone=dict(
    depth=56, layer_attention=dict(type="DLABase", head_channels=32, reduction=4),
    mrla_act_cfg=dict(type="ReLU"),  # as in the released code
))  # fmt: skip
