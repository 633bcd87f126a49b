# Eq. 8: ResNet-50 + MRLA-light with the previous output, to the letter, for the shortcut.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(recurrence="output")))
