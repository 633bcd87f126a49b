# ResNet-50 + attention-augmented convolutions (AA), ImageNet-1k, the paper's recipe.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(
        depth=50,
        mrla_drop_path_rate=None,
        layer_attention=None,
        plugins=[
            # The 3x3 convolutions of the last three stages; size is the map's at 224 px.
            dict(
                cfg=dict(type="mmrla.AttentionAugmentedConv", size=28),
                stages=(False, True, False, False),
                position="conv2",
            ),
            dict(
                cfg=dict(type="mmrla.AttentionAugmentedConv", size=14),
                stages=(False, False, True, False),
                position="conv2",
            ),
            dict(
                cfg=dict(type="mmrla.AttentionAugmentedConv", size=7),
                stages=(False, False, False, True),
                position="conv2",
            ),
        ],
    ),
)
