# DenseNet-161 of mmpretrain: layers that see all earlier ones of their stage, ImageNet-1k, on the
# recipe of MRLA's paper.
_base_ = "./_base_/resnet.py"

model = dict(
    backbone=dict(_delete_=True, type="DenseNet", arch="161"),
    head=dict(in_channels=2208),
)
