# RetinaNet on EfficientNet-Lite0 for blood cells (BCCD, a Pascal VOC folder), on one CPU thread.
_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "../../_base_/cpu.py"]

custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

data_root = "data/bccd/"
metainfo = dict(
    classes=("RBC", "WBC", "Platelets"), palette=[(220, 60, 60), (70, 90, 220), (60, 180, 90)]
)

model = dict(
    data_preprocessor=dict(mean=[127.0] * 3, std=[128.0] * 3),
    backbone=dict(
        _delete_=True,
        type="mmrla.MRLAEfficientNet",
        arch="lite0",
        mrla_drop_path_rate=0.0,
        out_indices=(3, 4, 5),
        frozen_stages=2,
        norm_eval=True,
        # ImageNet's weights, see docs/hosts.md.
        init_cfg=dict(type="mmrla.WarmStart", checkpoint="checkpoints/efficientnet-lite0.pth"),
    ),
    neck=dict(in_channels=[40, 112, 320], out_channels=64, start_level=0, num_outs=4),
    bbox_head=dict(
        num_classes=3,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        # At this size platelets are 16 pixels wide, white cells 75.
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32, 64]),
    ),
)

# The photographs have 640 x 480 pixels.
scale = (256, 192)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="RandomFlip", prob=[0.4, 0.4], direction=["horizontal", "vertical"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    # The evaluator takes the boxes from the samples.
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances"),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type="mmrla.CheckedCocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="ImageSets/Main/train.txt",
        data_prefix=dict(img="JPEGImages/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(train_dataloader, batch_size=8)
val_dataloader["dataset"] = dict(
    train_dataloader["dataset"], ann_file="ImageSets/Main/test.txt", pipeline=test_pipeline
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type="CocoMetric", metric="bbox", classwise=True)
test_evaluator = val_evaluator

max_epochs = 6
train_cfg = dict(type="mmrla.ResumableTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = _base_.pop("adamw")
param_scheduler = _base_.pop("warm_cosine")
param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type="mmrla.AtomicCheckpointHook", interval=1, max_keep_ckpts=1),
)
