# CIFAR-100: the basic blocks and the recipe of cifar10.py with 100 classes.
_base_ = "./cifar10.py"

data_preprocessor = dict(
    num_classes=100,
    mean=[129.304, 124.070, 112.434],
    std=[68.170, 65.392, 70.418],
)
model = dict(head=dict(num_classes=100))

# data_root: cifar-100-python/ or {train,test}/<class>/*.jpg
dataset = dict(type="mmrla.CIFAR100", data_root="data/cifar100/")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
