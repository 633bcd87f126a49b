# Mask R-CNN, DeiT-T + MRLA-light with a simple feature pyramid, COCO, 1x schedule.
_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "./_base_/coco.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmrla.MRLAVisionTransformer",
        arch="deit-tiny",
        img_size=224,
        patch_size=16,
        out_type="featmap",
        drop_path_rate=0.1,
        layer_attention=dict(type="MRLALight", head_channels=16),
        # From DeiT's ImageNet weights; MRLA grows in.
        init_cfg=dict(
            type="mmrla.WarmStart",
            checkpoint="https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
        ),
    ),
    neck=dict(_delete_=True, type="mmrla.SimpleFeaturePyramid", in_channels=192, out_channels=256),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={".cls_token": dict(decay_mult=0.0), ".pos_embed": dict(decay_mult=0.0)},
    ),
)

globals().update(_base_.pop("on_coco"))
