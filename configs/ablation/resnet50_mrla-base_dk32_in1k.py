# Table 4 (a): ResNet-50 + MRLA-base with the text's d_k = 32; the released code has 16.
_base_ = "../imagenet/resnet50_mrla-base_in1k.py"

model = dict(backbone=dict(layer_attention=dict(head_channels=32)))
