# ResNet-56 of basic blocks + recurrent layer aggregation (RLA_g), CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(
    backbone=dict(
        depth=56,
        layer_attention=dict(type="RecurrentLayerAggregation", hidden_channels=12),
    ),
    # The hidden map is appended to the last feature map.
    head=dict(in_channels=76),
)
