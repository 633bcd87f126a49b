# ATSS, ResNet-50 + MRLA-light, COCO, 1x schedule.
_base_ = ["mmdet::atss/atss_r50_fpn_1x_coco.py", "./_base_/coco_resnet.py"]
globals().update(_base_.pop("on_coco"))
