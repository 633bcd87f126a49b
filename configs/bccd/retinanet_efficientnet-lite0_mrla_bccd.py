# RetinaNet, EfficientNet-Lite0 + MRLA-light, blood cells (BCCD).
_base_ = "./_base_/retinanet_efficientnet-lite0.py"

model = dict(backbone=dict(layer_attention=dict(type="MRLALight", head_channels=8)))
