# EfficientNet-B1 + MRLA-light, ImageNet-1k, the paper's recipe.
_base_ = "./_base_/efficientnet.py"

# EfficientNet-B1 looks at 240 pixels.
train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 240
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 274
test_pipeline[2].crop_size = 240
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

model = dict(
    backbone=dict(
        arch="b1",
        layer_attention=dict(type="MRLALight", head_channels=8),
    ),
)
