# Table 12 (c): ResNet-50 + ECA, stochastic depth of ECA with MRLA's rate, ImageNet-1k; without it:
# ../imagenet/resnet50_eca_in1k.py.
_base_ = "../imagenet/resnet50_eca_in1k.py"

model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type="mmrla.ECA", drop_path_rate=0.2), position="after_conv3")],
    ),
)
