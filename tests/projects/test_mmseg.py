"""mmsegmentation trains, evaluates and loads networks on mmrla's backbones, by its own tools."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.projects.commands import check_layer_attentions, run, train_by_the_prefix_alone

pytestmark = pytest.mark.slow

MMSEG = "__import__('mmseg').__path__[0] + '/.mim/configs/{}'"
ITERS = 80
# A small network on the small set; a user's config for data of one's own looks like this.
SMALL = """
_base_ = {base}
meta = dict(classes=("ground", "red", "blue"), palette=[[0, 0, 0], [255, 0, 0], [0, 0, 255]])
pipeline = [dict(type=name) for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")]
train_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False,
    dataset=dict(
        _delete_=True, type="BaseSegDataset", metainfo=meta, data_root={data!r}, pipeline=pipeline,
        img_suffix=".png", data_prefix=dict(img_path="images", seg_map_path="masks")))
val_dataloader = dict(train_dataloader, batch_size=1)
test_dataloader = val_dataloader
train_cfg = dict(max_iters={iters}, val_interval={iters})
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, end={iters}, by_epoch=False)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval={iters} // 2))
randomness = dict(seed=0)
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict({backbone}depth=18, init_cfg=None),
    decode_head=dict(num_classes=3, channels=64, in_channels={in_channels}),
    auxiliary_head=dict(num_classes=3, channels=64, in_channels=256))
"""


def small(**kwargs: object) -> str:
    return SMALL.format(iters=ITERS, **kwargs)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Red and blue rectangles on noise, 64 px, and which pixel is which."""
    root, rng = tmp_path_factory.mktemp("segmentation"), np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for index in range(16):
        image = rng.integers(60, 190, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        for label, colour in ((1, (0, 0, 255)), (2, (255, 0, 0))):  # blue, green, red
            (y, x), (h, w) = rng.integers(0, 40, 2), rng.integers(16, 32, 2)
            image[y : y + h, x : x + w] = colour
            mask[y : y + h, x : x + w] = label
        cv2.imwrite(str(root / "images" / f"{index}.png"), image)
        cv2.imwrite(str(root / "masks" / f"{index}.png"), mask)
    return root


def miou(log: str) -> float:
    return float(re.findall(r"mIoU: (\S+)", log)[-1])


def check_training(log: str, work_dir: Path) -> None:
    """Losses fall, the network has learned the set, and its layer attentions with it."""
    losses = [float(x) for x in re.findall(r"Iter\(train\).*? loss: (\S+)", log)]
    assert len(losses) == ITERS
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3]), losses
    assert miou(log) > 60
    names = (f"iter_{n}.pth" for n in (ITERS // 2, ITERS))
    check_layer_attentions(work_dir, *names, part=".bn_mrla.weight")


def test_upernet_by_mim(projects, is_fork, data, tmp_path):
    """The documented config, trained and tested as ``mim train`` and ``mim test`` do it."""
    page = (ROOT / "docs/other_projects.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "upernet" in b)
    (tmp_path / "upernet_r50_mrla_ade20k.py").write_text(block)
    (tmp_path / "small.py").write_text(
        small(base="'./upernet_r50_mrla_ade20k.py'", data=str(data), backbone="",
                     in_channels=[64, 128, 256, 512])
    )  # fmt: skip
    package = "onedl-mmsegmentation" if is_fork else "mmsegmentation"

    def mim(command: str, *options: object) -> str:
        words = ["-m", "mim", command, package, "small.py", "--gpus", 0, *options]
        return run(projects, *words, cwd=tmp_path)

    log = mim("train", "--work-dir", "out")
    assert log.count("mmcv ops:") == 1
    check_training(log, tmp_path / "out")
    assert miou(mim("test", "--checkpoint", f"out/iter_{ITERS}.pth")) == miou(log)


def test_fcn_by_the_prefix_alone(projects, is_fork, data, tmp_path):
    """Strides traded for dilation, no custom_imports, by the script that mmseg installs."""
    base = MMSEG.format("fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py")
    host = (
        "_delete_=True, type='mmrla.MRLAResNet', strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), "
        "out_indices=(0, 1, 2, 3), norm_cfg=norm_cfg, layer_attention=dict(type='MRLABase', "
        "head_channels=16), "
    )
    (tmp_path / "small.py").write_text(
        small(base=base, data=str(data), backbone=host, in_channels=512)
    )
    log = train_by_the_prefix_alone(projects, "mmseg", "small.py", tmp_path, needs_ops=not is_fork)
    if log is not None:
        check_training(log, tmp_path / "out")
