"""Write a config for your own data in COCO's layout, with classes, sizes and schedule filled in."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from mmrla.datasets.findings import DataError
from mmrla.datasets.voc import read_set
from mmrla.engine.data.sets import DataSet, sets_in
from mmrla.engine.errors import exit_with_message, require_at_least

DETECTORS = ("retinanet", "faster_rcnn", "mask_rcnn")
GPU_IMAGES, CPU_IMAGES = 48_000, 1_200
"""Total training images over all epochs: 3,000 steps of 16; as many as a CPU trains on in ten
minutes."""

HEAD = """# {title}
_base_ = {base}

data_root = {root!r}
metainfo = dict(classes={classes!r})
"""
DATA = """
train_dataloader = dict({train_loader}dataset=dict({train_set}))
val_dataloader = dict({val_loader}dataset=dict({val_set}))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + {val_file!r})
test_evaluator = val_evaluator

# {images} training images. Steps of the learning rate go with max_epochs.
train_cfg = dict(max_epochs={epochs}, val_interval={interval})
"""
GPU = """
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end={epochs}, by_epoch=True, milestones={milestones}),
]
"""
CPU_MODEL = """
# A small network: half the depth and a quarter of the channels after the backbone.
model = dict(
    backbone=dict(
        depth=18,
        init_cfg=dict(type="mmrla.WarmStart", checkpoint="torchvision://resnet18"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=64, start_level=1, num_outs=4),
    bbox_head=dict(
        num_classes={num_classes},
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        # Objects are {small:.0f} to {large:.0f} pixels large at the scale below (5 to 95 %).
        anchor_generator=dict(octave_base_scale={base_scale}, strides=[8, 16, 32, 64]),
    ),
)

scale = {scale}
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
"""
CPU = """
optim_wrapper = _base_.pop("adamw")  # learning rate 0.001
param_scheduler = _base_.pop("warm_cosine")
param_scheduler[1].update(end={epochs}, T_max={epochs})
auto_scale_lr = dict(base_batch_size=4)
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser("mmrla new-config", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="a folder that mmrla convert-data wrote")
    parser.add_argument("out", type=Path, metavar="OUT.py", help="the config, in any folder")
    parser.add_argument("--detector", choices=DETECTORS, default="retinanet")
    parser.add_argument(
        "--cpu", action="store_true", help="a small RetinaNet, trained in ten minutes on a CPU"
    )
    parser.add_argument("--epochs", type=int, help="default: by the number of images")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the config; exits with status 2 and one line if the data is not suitable."""
    args = parse_args(argv)
    with exit_with_message():
        if args.out.suffix != ".py":
            raise ValueError(f"the config's name must end in .py, got {args.out.name!r}")
        if args.out.exists():
            raise FileExistsError(f"already exists: {args.out.absolute()}")
        if args.cpu and args.detector != "retinanet":
            raise ValueError(f"--cpu is a RetinaNet, got --detector {args.detector}")
        require_at_least(args, epochs=1)
        text, said = new_config(Path(args.data), args.detector, args.cpu, args.epochs)
        args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(text.encode())
    print(f"{args.out}: {said}")


def new_config(data: Path, detector: str, cpu: bool, epochs: int | None) -> tuple[str, str]:
    """The text of a config and a line about it.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A split is missing, or masks are needed and missing.
    """
    sets = {_split_of(one): one for one in sets_in(data) if one.ann_file is not None}
    for split in ("train", "val"):
        if split not in sets:
            raise ValueError(
                f"{data.absolute()} has no {split} set, only {sorted(sets) or 'none'}; "
                "mmrla convert-data --val 0.2 splits a validation set off"
            )
    content = _load(sets["train"])
    classes = [category["name"] for category in content["categories"]]
    images = len(content["images"])
    if detector == "mask_rcnn" and not all(a.get("segmentation") for a in content["annotations"]):
        raise ValueError(f"{sets['train'].ann_file}: not every object has a mask, so no Mask R-CNN")
    epochs = epochs or max(
        1 if cpu else 12, min(100, round((CPU_IMAGES if cpu else GPU_IMAGES) / images))
    )
    root = data.absolute()
    parts = {
        split: f'data_root=data_root, metainfo=metainfo, ann_file="{ann}", '
        f'data_prefix=dict(img="{folder}/")'
        for split, one in sets.items()
        for ann, folder in [(_below(one.ann_file, root), _below(one.images, root))]
    }
    facts: dict[str, Any] = dict(
        title=f"{detector}: {len(classes)} classes of {data.name}, "
        + ("on a CPU." if cpu else "the recipe of COCO, its schedule by the number of images."),
        base=f'"mmrla::{detector}_r50_mrla_1x.py"', root=f"{root}/", classes=tuple(classes),
        num_classes=len(classes), images=images, epochs=epochs,
        interval=max(1, epochs // 4) if cpu else 1,
        val_file=_below(sets["val"].ann_file, root),
        milestones=[max(1, round(epochs * 2 / 3)), max(1, round(epochs * 11 / 12))],
        train_set=parts["train"] + (", pipeline=train_pipeline" if cpu else ""),
        val_set=parts["val"] + (", pipeline=test_pipeline" if cpu else ""),
        train_loader="batch_size=4, num_workers=0, " if cpu else "",
        val_loader="num_workers=0, " if cpu else "",
    )  # fmt: skip
    if cpu:
        try:
            facts |= _sizes(content)
        except (LookupError, TypeError, ZeroDivisionError) as error:
            raise DataError(
                f"{sets['train'].ann_file}: a box, or the size of its image, cannot be read "
                f"({error!r}); run mmrla check-data {data}"
            ) from error
        facts["base"] = f'[{facts["base"]}, "mmrla::_base_/cpu.py"]'
        text = (HEAD + CPU_MODEL + DATA + CPU).format(**facts)
    else:
        text = (HEAD + _heads(detector, len(classes)) + DATA + GPU).format(**facts)
    return text, f"{len(classes)} classes, {images} training images, {epochs} epochs"


def _split_of(one: DataSet) -> str:
    name = one.ann_file.stem.lower() if one.ann_file else ""
    return next((split for split in ("train", "val", "test") if split in name), name)


def _load(one: DataSet) -> dict[str, Any]:
    assert one.ann_file is not None
    if not one.is_json:
        raise ValueError(f"{one.ann_file} is not COCO's format; mmrla convert-data first")
    content = read_set(one.ann_file)
    if not content.get("images") or not content.get("annotations"):
        raise DataError(f"{one.ann_file}: no images or no annotations")
    return content


def _below(path: Path | None, root: Path) -> str:
    assert path is not None
    return path.absolute().relative_to(root).as_posix()


def _heads(detector: str, classes: int) -> str:
    parts = f"bbox_head=dict(num_classes={classes})"
    if detector == "mask_rcnn":
        parts += f", mask_head=dict(num_classes={classes})"
    if detector != "retinanet":
        parts = f"roi_head=dict({parts})"
    return f"\nmodel = dict({parts})\n"


def _sizes(content: dict[str, Any]) -> dict[str, Any]:
    """The scale of images, and anchors for the objects in them."""
    widths, heights = ([image[key] for image in content["images"]] for key in ("width", "height"))
    long, short = max(median(widths), median(heights)), min(median(widths), median(heights))
    scale = (320, max(64, round(320 * short / long / 32) * 32))
    factors = {
        image["id"]: min(
            scale[0] / max(image["width"], image["height"]),
            scale[1] / min(image["width"], image["height"]),
        )
        for image in content["images"]
    }
    sides = [
        math.sqrt(max(0.0, a["bbox"][2] * a["bbox"][3])) * factors[a["image_id"]]
        for a in content["annotations"]
    ]
    small, *_, large = quantiles([*sides, *sides], n=20)
    # Anchors begin at base_scale times the first stride, 8.
    base_scale = min(4, max(1, round(small / 8)))
    return dict(scale=scale, small=small, large=large, base_scale=base_scale)
