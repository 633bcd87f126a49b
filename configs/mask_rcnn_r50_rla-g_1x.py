# Mask R-CNN, ResNet-50 + recurrent layer aggregation (RLA_g), COCO, 1x schedule.
_base_ = "./mask_rcnn_r50_mrla_1x.py"

# As in its released detectors, the neck sees the plain network's maps alone.
model = dict(
    backbone=dict(
        layer_attention=dict(
            _delete_=True, type="RecurrentLayerAggregation", hidden_channels=32, concat_output=False
        )
    )
)
