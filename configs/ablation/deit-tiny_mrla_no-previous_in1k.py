# Like Table 4 (b): DeiT-T + MRLA-light entirely without previous information.
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(recurrence=None)))
