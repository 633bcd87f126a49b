# What the COCO detectors here have in common, under names that mmdet's bases do not use. A config
# takes them out with _base_.pop(...): one key replaces mmdet's, and none is left over.

# Makes mmcv's operations available where mmcv was installed without its compiled extension.
custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

# Bad images and annotations are left out with a count in the log; on_bad="raise" stops instead.
checked_train = dict(dataset=dict(type="mmrla.CheckedCocoDataset", on_bad="skip"))
checked_test = dict(dataset=dict(type="mmrla.CheckedCocoDataset"))

# A run that was killed goes on with --resume as if nothing had happened.
resumable_loop = dict(type="mmrla.ResumableTrainLoop")
resumable_hooks = dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook"))
