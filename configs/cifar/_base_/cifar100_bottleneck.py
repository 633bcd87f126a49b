# CIFAR-100 as DLA and KCLA train it: the network of cifar10_bottleneck.py with 100 classes.
_base_ = "./cifar100.py"

model = dict(
    backbone=dict(
        block="bottleneck", zero_init_residual=False, mrla_drop_path_rate=0.2, zero_init_mrla=False
    ),
    head=dict(in_channels=256),
)
