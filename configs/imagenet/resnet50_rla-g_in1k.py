# ResNet-50 + recurrent layer aggregation (RLA_g), ImageNet-1k, on the recipe of MRLA's paper.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(
        depth=50,
        layer_attention=dict(type="RecurrentLayerAggregation", hidden_channels=32),
        mrla_drop_path_rate=None,  # it adds no branch that could be dropped
    ),
    # The hidden map is appended to the last feature map.
    head=dict(in_channels=2080),
)
