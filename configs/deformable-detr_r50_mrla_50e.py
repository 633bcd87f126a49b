# Deformable DETR, ResNet-50 + MRLA-light, COCO, 50 epochs.
_base_ = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"

# Makes mmcv's operations available where mmcv was installed without its compiled extension.
custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        type="mmrla.MRLAResNet",
        layer_attention=dict(type="MRLALight", head_channels=32),
        # From the base's torchvision checkpoint; MRLA grows in.
        init_cfg=dict(type="mmrla.WarmStart"),
    )
)

# Norms behind fresh layer attentions learn statistics; every process ends an epoch with the same.
custom_hooks = [dict(type="SyncBuffersHook")]

# Bad images and annotations are left out with a count in the log; on_bad="raise" stops instead.
train_dataloader = dict(dataset=dict(type="mmrla.CheckedCocoDataset", on_bad="skip"))
val_dataloader = dict(dataset=dict(type="mmrla.CheckedCocoDataset"))
test_dataloader = val_dataloader

# A run that was killed goes on with --resume as if nothing had happened.
train_cfg = dict(type="mmrla.ResumableTrainLoop")
default_hooks = dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook"))
