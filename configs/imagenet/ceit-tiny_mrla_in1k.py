# CeiT-T + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./deit-tiny_mrla_in1k.py"

# Stochastic depth as in the block itself.
model = dict(backbone=dict(type="mmrla.MRLACeiT", arch="tiny", mrla_drop_path_rate=None))
