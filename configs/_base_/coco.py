# What the COCO detectors here have in common, under a name that mmdet's bases do not use: two bases
# may not hold the same key. globals().update(_base_.pop("on_coco")) makes it a config's own.

# Makes mmcv's operations available where mmcv was installed without its compiled extension.
custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

on_coco = dict(
    # Bad images and annotations are left out with a count in the log; on_bad="raise" stops instead.
    train_dataloader=dict(dataset=dict(type="mmrla.CheckedCocoDataset", on_bad="skip")),
    val_dataloader=dict(dataset=dict(type="mmrla.CheckedCocoDataset")),
    test_dataloader=dict(dataset=dict(type="mmrla.CheckedCocoDataset")),
    # A run that was killed goes on with --resume as if nothing had happened.
    train_cfg=dict(type="mmrla.ResumableTrainLoop"),
    default_hooks=dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook")),
)
