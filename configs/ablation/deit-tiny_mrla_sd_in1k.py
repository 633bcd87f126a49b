# B.4: DeiT-T + MRLA-light that shares its block's stochastic depth; the released code has none.
_base_ = "../imagenet/deit-tiny_mrla_in1k.py"

model = dict(backbone=dict(mrla_drop_path_rate=None))
