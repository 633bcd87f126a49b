# Table 12c: ResNet-50 + ECA without stochastic depth, ImageNet-1k, the paper's recipe.
_base_ = "../imagenet/resnet50_eca_in1k.py"
