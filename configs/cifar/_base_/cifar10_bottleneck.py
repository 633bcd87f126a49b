# CIFAR-10 as DLA and KCLA train it: the recipe of cifar10.py on bottlenecks (9 n + 2), no norm
# that starts at zero, and stochastic depth on the layer attention alone, if there is one.
_base_ = "./cifar10.py"

model = dict(
    backbone=dict(
        block="bottleneck", zero_init_residual=False, mrla_drop_path_rate=0.2, zero_init_mrla=False
    ),
    head=dict(in_channels=256),
)
