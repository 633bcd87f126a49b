# Like Table 4 (e): DeiT-T + MRLA-light with the identity connection, lambda = 1.
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(fixed_lambda=1)))
