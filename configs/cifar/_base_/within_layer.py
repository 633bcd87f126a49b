# Attentions within a layer for the CIFAR ResNets of basic blocks, three stages.
within_layer = dict(
    se=[dict(cfg=dict(type="mmrla.SE"), position="after_conv2")],
    eca=[dict(cfg=dict(type="mmrla.ECA"), position="after_conv2")],
    cbam=[dict(cfg=dict(type="mmrla.CBAM"), position="after_conv2")],
    ba=[dict(cfg=dict(type="mmrla.BridgeAttention"), position="after_conv2")],
    # 1/16 would leave one channel, which a layer norm makes zero.
    gc=[dict(cfg=dict(type="ContextBlock", ratio=1 / 4), position="after_conv2")],
    # One block, before the last residual block of the last but one stage, as in ResNet-50.
    gc1=[
        dict(
            cfg=dict(type="ContextBlock", ratio=1 / 4),
            stages=(False, True, False),
            blocks=(-2,),
            position="after_block",
        )
    ],
    nl=[
        dict(
            cfg=dict(type="NonLocal2d", use_scale=False),
            stages=(False, True, False),
            blocks=(-2,),
            position="after_block",
        )
    ],
    # The last two stages.
    tdam=[dict(cfg=dict(type="mmrla.TDAM"), stages=(False, True, True), position="after_conv2")],
    # Two blocks in the second stage, three in the third.
    a2=[
        dict(
            cfg=dict(type="mmrla.DoubleAttention"),
            stages=(False, True, False),
            blocks=(-3, -2),
            position="after_block",
        ),
        dict(
            cfg=dict(type="mmrla.DoubleAttention"),
            stages=(False, False, True),
            blocks=(-4, -3, -2),
            position="after_block",
        ),
    ],
    # The second 3x3 convolutions of the last two stages. With 32 channels, ImageNet's 8 heads and
    # ratio would leave less than one channel per head for the values.
    aa=[
        dict(
            cfg=dict(type="mmrla.AttentionAugmentedConv", num_heads=4, value_ratio=0.25, size=16),
            stages=(False, True, False),
            position="conv2",
        ),
        dict(
            cfg=dict(type="mmrla.AttentionAugmentedConv", num_heads=4, value_ratio=0.25, size=8),
            stages=(False, False, True),
            position="conv2",
        ),
    ],
)
