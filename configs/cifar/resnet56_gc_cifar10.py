# ResNet-56 of basic blocks + GC blocks, CIFAR-10, 180 epochs.
_base_ = "./_base_/cifar10.py"

model = dict(
    backbone=dict(
        depth=56,
        layer_attention=None,
        # 1/16 would leave one channel, which a layer norm makes zero.
        plugins=[dict(cfg=dict(type="ContextBlock", ratio=1 / 4), position="after_conv2")],
    ),
)
