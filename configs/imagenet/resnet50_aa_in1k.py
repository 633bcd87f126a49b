# ResNet-50 + attention-augmented convolutions (AA), ImageNet-1k, the paper's recipe.
_base_ = ["./resnet50_plain_in1k.py", "../_base_/within_layer.py"]

model = dict(backbone=dict(plugins=_base_.pop("within_layer").aa))
