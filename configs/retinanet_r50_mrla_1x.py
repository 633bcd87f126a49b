# RetinaNet, ResNet-50 + MRLA-light, COCO, 1x schedule.
_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "./_base_/coco_resnet.py"]

model = dict(backbone=_base_.pop("mrla_resnet"))
train_dataloader = _base_.pop("checked_train")
val_dataloader = test_dataloader = _base_.pop("checked_test")
train_cfg = _base_.pop("resumable_loop")
default_hooks = _base_.pop("resumable_hooks")
