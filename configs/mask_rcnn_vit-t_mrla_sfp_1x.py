# Mask R-CNN, DeiT-T + MRLA-light with a simple feature pyramid, COCO, 1x schedule.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

# Makes mmcv's operations available where mmcv was installed without its compiled extension.
custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

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

# Bad images and annotations are left out with a count in the log; on_bad="raise" stops instead.
train_dataloader = dict(dataset=dict(type="mmrla.CheckedCocoDataset", on_bad="skip"))
val_dataloader = dict(dataset=dict(type="mmrla.CheckedCocoDataset"))
test_dataloader = val_dataloader

# A run that was killed goes on with --resume as if nothing had happened.
train_cfg = dict(type="mmrla.ResumableTrainLoop")
default_hooks = dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook"))
