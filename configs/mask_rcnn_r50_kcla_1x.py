# Mask R-CNN, ResNet-50 + key-correlated layer attention (KCLA), COCO, 1x schedule.
_base_ = "./mask_rcnn_r50_mrla_1x.py"

model = dict(
    backbone=dict(
        layer_attention=dict(type="KCLA", head_channels=64), mrla_act_cfg=dict(type="ReLU")
    )
)
