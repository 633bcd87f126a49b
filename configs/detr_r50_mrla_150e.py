# DETR, ResNet-50 + MRLA-light, COCO, 150 epochs.
_base_ = ["mmdet::detr/detr_r50_8xb2-150e_coco.py", "./_base_/coco_resnet.py"]

model = dict(backbone=_base_.pop("mrla_resnet"))
train_dataloader = _base_.pop("checked_train")
val_dataloader = test_dataloader = _base_.pop("checked_test")
train_cfg = _base_.pop("resumable_loop")
default_hooks = _base_.pop("resumable_hooks")
