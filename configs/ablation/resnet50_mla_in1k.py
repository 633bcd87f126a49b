# Table 4 (a): ResNet-50 + MLA, Eq. 4, with MRLA-light's d_k. MRLA-base is in imagenet/.
_base_ = "../imagenet/resnet50_mrla_in1k.py"

model = dict(backbone=dict(layer_attention=dict(_delete_=True, type="MLA", head_channels=32)))
