# Deformable DETR, ResNet-50 + MRLA-light, COCO, 50 epochs.
_base_ = ["mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", "./_base_/coco_resnet.py"]

model = dict(backbone=_base_.pop("mrla_resnet"))
train_dataloader = _base_.pop("checked_train")
val_dataloader = test_dataloader = _base_.pop("checked_test")
train_cfg = _base_.pop("resumable_loop")
default_hooks = _base_.pop("resumable_hooks")
