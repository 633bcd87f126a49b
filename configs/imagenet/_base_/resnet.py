# The paper's recipe for ResNets: 100 epochs, batch 256, SGD 0.1 divided by 10 every 30 epochs, the
# released command's 3 epochs of warm-up; stochastic depth 0.2 on the layer attention alone.
_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs32.py",
    "mmpretrain::_base_/schedules/imagenet_bs256.py",
    "../../_base_/classifier.py",
]

model = dict(
    # The released start: layer attentions at full strength.
    backbone=dict(type="mmrla.MRLAResNet", mrla_drop_path_rate=0.2, zero_init_mrla=False),
    head=dict(type="LinearClsHead", num_classes=1000, in_channels=2048),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, end=3, convert_to_iter_based=True),
    dict(type="MultiStepLR", by_epoch=True, milestones=[30, 60, 90], gamma=0.1),
]

train_cfg = dict(_delete_=True, type="mmrla.ResumableTrainLoop", max_epochs=100, val_interval=1)
