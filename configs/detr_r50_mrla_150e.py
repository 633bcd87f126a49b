# DETR, ResNet-50 + MRLA-light, COCO, 150 epochs.
_base_ = ["mmdet::detr/detr_r50_8xb2-150e_coco.py", "./_base_/coco_resnet.py"]
globals().update(_base_.pop("on_coco"))
