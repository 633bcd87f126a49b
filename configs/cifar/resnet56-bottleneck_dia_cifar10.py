# ResNet-56 of bottlenecks + DIANet's unit, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

# It adds no branch that could be dropped.
attention = dict(type="DIAUnit", reduction=4)
model = dict(backbone=dict(depth=56, layer_attention=attention, mrla_drop_path_rate=None))
