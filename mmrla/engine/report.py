"""Reports of a run for people: the AP table, the curve, pictures of predictions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.structures import InstanceData

_COLUMNS = {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75", "mAP_s": "APs", "mAP_m": "APm",
            "mAP_l": "APl"}  # fmt: skip
_ROWS = {"bbox": "box", "segm": "mask"}


def newest(folder: str | Path, pattern: str) -> Path:
    """The newest file below ``folder`` that matches ``pattern``.

    Raises:
        FileNotFoundError: There is none.
    """
    found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no {pattern} in {Path(folder).absolute()}")
    return found[-1]


def ap_table(metrics: Mapping[str, float]) -> str:
    """COCO metrics as a text table.

    Returns:
        A row per available metric, values in percent, ``-`` if there was nothing to evaluate
        (COCO's -1).
    """
    lines = ["      " + "".join(f"{title:>7}" for title in _COLUMNS.values())]
    for key, title in _ROWS.items():
        values = [metrics.get(f"coco/{key}_{column}") for column in _COLUMNS]
        if values[0] is None:
            continue
        cells = ["-" if v is None or v < 0 or np.isnan(v) else f"{100 * v:.1f}" for v in values]
        lines.append(f"{title:<6}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines)


def read_scalars(path: str | Path) -> list[dict[str, Any]]:
    """The records of an mmengine ``scalars.json``, one JSON object per line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def plot_run(scalars: Sequence[Mapping[str, Any]], out: str | Path) -> None:
    """Plot the loss, and AP if it was evaluated, of an epoch-based run over its epochs, as PNG.

    Raises:
        ValueError: No record contains a loss.
    """
    from matplotlib.figure import Figure  # no global backend: works without a screen

    train = [record for record in scalars if "loss" in record]
    if not train:
        raise ValueError("the log holds no loss: nothing was trained")
    val = [record for record in scalars if any(f"coco/{key}_mAP" in record for key in _ROWS)]
    # Validation records carry the epoch as their step, training records the iteration.
    per_epoch = max(record["iter"] for record in train) / max(record["epoch"] for record in train)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    xs = [record["iter"] / per_epoch for record in train]
    (loss,) = left.plot(xs, [record["loss"] for record in train], color="0.45", label="loss")
    left.set(xlabel="epoch", ylabel="training loss", xlim=(0, None), ylim=(0, None))
    handles = [loss]
    if val:
        right = left.twinx()
        right.set(ylabel="AP on the validation set", ylim=(0, 1))
        right.grid(alpha=0.3)
        for (key, title), color in zip(_ROWS.items(), ("tab:blue", "tab:red"), strict=True):
            points = [(r["step"], r[f"coco/{key}_mAP"]) for r in val if f"coco/{key}_mAP" in r]
            if points:
                label = f"{title} AP"
                handles += right.plot(*zip(*points, strict=True), "o-", color=color, label=label)
                right.annotate(
                    f"{title} {points[-1][1]:.3f}", points[-1],
                    xytext=(0, 8 if key == "segm" else -16), textcoords="offset points",
                    color=color, ha="right",
                )  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    figure.savefig(out, dpi=120)


def _enlarged(instances: InstanceData, factor: int, size: tuple[int, int]) -> InstanceData:
    """Instances scaled to the image enlarged to ``size`` (height, width)."""
    large = InstanceData()
    for name, value in instances.all_items():
        if name == "bboxes":
            value = getattr(value, "tensor", value) * factor
        elif name == "masks":
            masks = np.asarray(value.to_ndarray() if hasattr(value, "to_ndarray") else value.cpu())
            value = np.zeros((len(masks), *size), bool)
            for i, mask in enumerate(masks):
                value[i] = cv2.resize(mask.astype(np.float32), size[::-1]) > 0.5
        large.set_field(value, name)
    return large


def draw_predictions(
    model: Any, dataset: Any, indices: Sequence[int], out: str | Path, min_side: int = 480,
    score_thr: float = 0.5,
) -> list[Path]:  # fmt: skip
    """Write one picture per image: ground truth on the left, predictions on the right.

    Args:
        model: A detector in eval mode, as :func:`mmdet.apis.init_detector` returns it.
        dataset: The mmdet dataset to take images and ground truth from.
        indices: Which of its images.
        out: Folder for ``<image name>.png``; created if it does not exist.
        min_side: Smaller images are enlarged until their shorter side has this many pixels.
        score_thr: Predictions below this score are left out.
    """
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index in indices:
        item = dataset[index]
        batch = dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]])
        with torch.no_grad():
            (sample,) = model.test_step(batch)
        path = out / f"{Path(sample.img_path).stem}.png"
        draw_sample(visualizer, sample, path, min_side, score_thr, draw_gt=True)
        written.append(path)
    return written


def draw_sample(
    visualizer: Any, sample: Any, path: Path, min_side: int = 480, score_thr: float = 0.5, *,
    draw_gt: bool = False,
) -> None:  # fmt: skip
    """Write the picture of a detector's result, with ground truth to its left if ``draw_gt``."""
    image = mmcv.imconvert(mmcv.imread(sample.img_path), "bgr", "rgb")
    factor = max(1, -(-min_side // min(image.shape[:2])))
    size = (image.shape[0] * factor, image.shape[1] * factor)
    large = cv2.resize(image, size[::-1], interpolation=cv2.INTER_NEAREST)
    shown = sample.new()
    if draw_gt:
        truth = sample.gt_instances
        # Ground truth lies in the resized image that the network saw.
        truth = truth.cpu() if hasattr(truth, "cpu") else truth
        scale = sample.metainfo.get("scale_factor", (1.0, 1.0))
        if tuple(scale) != (1.0, 1.0):
            truth.bboxes = truth.bboxes / truth.bboxes.new_tensor(scale).repeat(2)
        shown.gt_instances = _enlarged(truth, factor, size)
    shown.pred_instances = _enlarged(sample.pred_instances.cpu(), factor, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a contour touches the border
        visualizer.add_datasample(
            path.stem, large, shown, draw_gt=draw_gt, pred_score_thr=score_thr, out_file=str(path)
        )
