# small ViT + Block AttnRes, four blocks of 4 sub-layers, CIFAR-10, 200 epochs.
_base_ = "./_base_/cifar10_vit.py"

model = dict(backbone=dict(layer_attention=dict(type="AttnRes", block_size=4)))
