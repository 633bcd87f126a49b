# small ViT + AttnRes, CIFAR-10, 200 epochs.
_base_ = "./_base_/cifar10_vit.py"

model = dict(backbone=dict(layer_attention=dict(type="AttnRes")))
