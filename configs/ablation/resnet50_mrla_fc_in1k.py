# Table 4 (d): ResNet-50 + MRLA-light with fully connected layers for Conv1D.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(projection="fc")))
