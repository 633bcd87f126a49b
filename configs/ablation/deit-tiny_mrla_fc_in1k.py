# Like Table 4 (d): DeiT-T + MRLA-light with fully connected layers for Conv1D.
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(projection="fc")))
