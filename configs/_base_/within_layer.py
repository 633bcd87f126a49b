# Attentions within a layer for ResNets of four stages, as their papers place them in ResNet-50.
within_layer = dict(
    se=[dict(cfg=dict(type="mmrla.SE"), position="after_conv3")],
    eca=[dict(cfg=dict(type="mmrla.ECA"), position="after_conv3")],
    cbam=[dict(cfg=dict(type="mmrla.CBAM"), position="after_conv3")],
    ba=[dict(cfg=dict(type="mmrla.BridgeAttention"), position="after_conv3")],
    gc=[
        dict(
            cfg=dict(type="ContextBlock", ratio=1 / 16),
            stages=(False, True, True, True),
            position="after_conv3",
        )
    ],
    # One block, before the last residual block of the third stage.
    gc1=[
        dict(
            cfg=dict(type="ContextBlock", ratio=1 / 16),
            stages=(False, False, True, False),
            blocks=(-2,),
            position="after_block",
        )
    ],
    nl=[
        dict(
            cfg=dict(type="NonLocal2d", use_scale=False),
            stages=(False, False, True, False),
            blocks=(-2,),
            position="after_block",
        )
    ],
    # The last two stages.
    tdam=[
        dict(
            cfg=dict(type="mmrla.TDAM"),
            stages=(False, False, True, True),
            position="after_conv3",
        )
    ],
    # Two blocks in the second stage, three in the third, before its last residual blocks.
    a2=[
        dict(
            cfg=dict(type="mmrla.DoubleAttention"),
            stages=(False, True, False, False),
            blocks=(-3, -2),
            position="after_block",
        ),
        dict(
            cfg=dict(type="mmrla.DoubleAttention"),
            stages=(False, False, True, False),
            blocks=(-4, -3, -2),
            position="after_block",
        ),
    ],
    # The 3x3 convolutions of the last three stages; size is the map's at 224 px.
    aa=[
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
)
