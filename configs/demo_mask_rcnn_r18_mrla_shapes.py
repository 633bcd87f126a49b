# A small Mask R-CNN with an MRLA backbone on the generated shapes (`make demo`), trained from
# scratch in minutes on a CPU.
_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "./_base_/cpu.py"]

custom_imports = dict(imports=["mmrla"], allow_failed_imports=False)

data_root = "data/shapes/"
metainfo = dict(
    classes=("circle", "square", "triangle"),
    palette=[(230, 60, 60), (60, 200, 90), (70, 110, 240)],
)
num_classes = 3

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        type="mmrla.MRLAResNet",
        depth=18,
        stem_channels=16,
        base_channels=16,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,  # from scratch
        layer_attention=dict(type="MRLALight", head_channels=16),
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=48, norm_cfg=dict(type="BN")),
    rpn_head=dict(
        in_channels=48,
        feat_channels=48,
        anchor_generator=dict(scales=[4]),
    ),
    roi_head=dict(
        # One sample a bin, for speed on the CPU.
        bbox_roi_extractor=dict(out_channels=48, finest_scale=28, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(
            in_channels=48,
            fc_out_channels=128,
            num_classes=num_classes,
        ),
        mask_roi_extractor=dict(out_channels=48, finest_scale=28, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(num_convs=2, in_channels=48, conv_out_channels=48, num_classes=num_classes),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=48)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(max_per_img=30),
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=[0.4, 0.4], direction=["horizontal", "vertical"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        type="mmrla.CheckedCocoDataset",
        on_bad="raise",
        data_root=data_root,
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=True, min_size=8),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        type="mmrla.CheckedCocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

max_epochs = 7
train_cfg = dict(type="mmrla.ResumableTrainLoop", max_epochs=max_epochs, val_interval=2)
optim_wrapper = _base_.pop("adamw")
optim_wrapper.optimizer.update(lr=0.003)
param_scheduler = _base_.pop("warm_cosine")
param_scheduler[0].update(end=100)
param_scheduler[1].update(eta_min=2e-5, end=max_epochs, T_max=max_epochs)
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(
        type="mmrla.AtomicCheckpointHook", interval=1, max_keep_ckpts=2, save_best=None
    ),
)
