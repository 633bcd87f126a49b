# ResNet-56 of bottlenecks + dynamic layer attention, base, CIFAR-100, 180 epochs.
_base_ = "./_base_/cifar100_bottleneck.py"

attention = dict(type="DLABase", head_channels=16, reduction=4)
act = dict(type="ReLU")  # as in the released code
model = dict(backbone=dict(depth=56, layer_attention=attention, mrla_act_cfg=act))
