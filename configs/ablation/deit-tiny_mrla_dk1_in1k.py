# Like Table 4 (f): DeiT-T + CRLA (MRLA-light with d_k = 1).
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(head_channels=1)))
