# Like Table 4 (a): DeiT-T + MLA, Eq. 4, with MRLA-light's d_k. MRLA-base is in imagenet/.
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="MLA", head_channels=16)))
