# Like Table 4 (f): DeiT-T + MRLA-light with d_k = C, one head.
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(head_channels="all")))
