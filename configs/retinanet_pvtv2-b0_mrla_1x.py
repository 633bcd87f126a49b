# RetinaNet, PVTv2-B0 + MRLA-light, COCO, 1x schedule with PVTv2's optimizer.
_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "./_base_/coco_pvtv2.py"]
globals().update(_base_.pop("on_coco"))
