# Table 12 (b): ResNet-50 + MRLA-light with Mixup and label smoothing for stochastic depth.
# Their strengths are not in the text: 0.2 and 0.1, as in mmpretrain's ResNets.
_base_ = "./resnet50_mrla_no-sd_in1k.py"

model = dict(
    head=dict(loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=1000)),
    train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)),
)
