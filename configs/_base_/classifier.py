# What classifiers of mmpretrain have in common.
_base_ = "mmpretrain::_base_/default_runtime.py"

# Makes mmcv's operations available where mmcv was installed without its compiled extension.
custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

model = dict(type="ImageClassifier", neck=dict(type="GlobalAveragePooling"))
# With a train_cfg of type mmrla.ResumableTrainLoop, a run that was killed goes on with --resume as
# if nothing had happened.
default_hooks = dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook"))
