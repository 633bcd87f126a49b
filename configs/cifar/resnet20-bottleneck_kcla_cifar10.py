# ResNet-20 of bottlenecks + key-correlated layer attention (KCLA), CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

attention = dict(type="KCLA", head_channels=16)
act = dict(type="ReLU")
model = dict(backbone=dict(depth=20, layer_attention=attention, mrla_act_cfg=act))
