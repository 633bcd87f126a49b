# RetinaNet, PVTv2-B1 + MRLA-light, COCO, 1x schedule with PVTv2's optimizer.
_base_ = ["./retinanet_pvtv2-b0_mrla_1x.py", "./_base_/pvtv2_b1.py"]

model = _base_.pop("pvtv2_b1")
