# ResNet-56 of bottlenecks + recurrent layer aggregation (RLA_g), CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10_bottleneck.py"

# It adds no branch that could be dropped.
attention = dict(type="RecurrentLayerAggregation", hidden_channels=12)
model = dict(
    backbone=dict(depth=56, layer_attention=attention, mrla_drop_path_rate=None),
    head=dict(in_channels=268),  # the hidden map is appended to the last feature map
)
