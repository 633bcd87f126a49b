# plain EfficientNet-Lite0, ImageNet-1k, on the recipe of MRLA's paper for EfficientNets.
_base_ = "./_base_/efficientnet.py"

# Lite networks normalise all channels alike.
data_preprocessor = dict(mean=[127.0] * 3, std=[128.0] * 3)
model = dict(backbone=dict(arch="lite0", layer_attention=None))
