# Deformable DETR, ResNet-50 + MRLA-light, COCO, 50 epochs.
_base_ = ["mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", "./_base_/coco_resnet.py"]
globals().update(_base_.pop("on_coco"))
