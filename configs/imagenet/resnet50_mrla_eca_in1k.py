# ResNet-50 + MRLA-light + ECA, which the released code allows, ImageNet-1k, the paper's recipe.
_base_ = "./resnet50_mrla_in1k.py"

model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type="mmrla.ECA"), position="after_conv3")],
    )
)
