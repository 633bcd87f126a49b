# RetinaNet, plain EfficientNet-Lite0, blood cells (BCCD).
_base_ = "./_base_/retinanet_efficientnet-lite0.py"

model = dict(backbone=dict(layer_attention=None))
