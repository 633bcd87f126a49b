# ResNet-56 of basic blocks + MRLA-light + SE, CIFAR-10, 180 epochs.
_base_ = "./resnet56_mrla_cifar10.py"

model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type="mmrla.SE"), position="after_conv2")],
    )
)
