# RetinaNet, PVTv2-B0 + MRLA-light, COCO, 1x schedule with PVTv2's optimizer.
_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "./_base_/coco_pvtv2.py"]

model = _base_.pop("pvtv2_b0")
optim_wrapper = _base_.pop("adamw")
train_dataloader = _base_.pop("checked_train")
val_dataloader = test_dataloader = _base_.pop("checked_test")
train_cfg = _base_.pop("resumable_loop")
default_hooks = _base_.pop("resumable_hooks")
