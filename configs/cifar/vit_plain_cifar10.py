# plain small ViT: the baseline on the same code, CIFAR-10, 200 epochs.
_base_ = "./_base_/cifar10_vit.py"

model = dict(backbone=dict(layer_attention=None))
