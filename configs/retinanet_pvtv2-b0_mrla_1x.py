# RetinaNet, PVTv2-B0 + MRLA-light, COCO, 1x schedule with PVTv2's optimizer.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

# Makes mmcv's operations available where mmcv was installed without its compiled extension.
custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmrla.MRLAPyramidVisionTransformerV2",
        arch="b0",
        layer_attention=dict(type="MRLALight", head_channels=16),
        mrla_drop_path_rate=None,  # the block's own
        # From the authors' ImageNet weights; MRLA grows in.
        init_cfg=dict(
            type="mmrla.WarmStart",
            checkpoint="https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b0.pth",
        ),
    ),
    neck=dict(in_channels=[32, 64, 160, 256]),
)

optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, weight_decay=0.0001))

# Bad images and annotations are left out with a count in the log; on_bad="raise" stops instead.
train_dataloader = dict(dataset=dict(type="mmrla.CheckedCocoDataset", on_bad="skip"))
val_dataloader = dict(dataset=dict(type="mmrla.CheckedCocoDataset"))
test_dataloader = val_dataloader

# A run that was killed goes on with --resume as if nothing had happened.
train_cfg = dict(type="mmrla.ResumableTrainLoop")
default_hooks = dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook"))
