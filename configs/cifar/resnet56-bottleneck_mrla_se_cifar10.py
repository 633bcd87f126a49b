# ResNet-56 of bottlenecks + MRLA-light + SE, CIFAR-10, 180 epochs.
_base_ = "./resnet56-bottleneck_mrla_cifar10.py"

model = dict(backbone=dict(plugins=[dict(cfg=dict(type="mmrla.SE"))]))
