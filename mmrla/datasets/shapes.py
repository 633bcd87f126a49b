"""A small COCO-format instance-segmentation dataset of drawn shapes, generated from a seed.

Circles, squares and triangles of any colour, size and rotation overlap on textured backgrounds, so
a network has to distinguish outlines, not colours, and depth order. Annotations cover the visible
parts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np

CLASSES = ("circle", "square", "triangle")
"""Names of the set's classes, in the order of their ids, which are 1, 2 and 3."""

_SUPERSAMPLING = 2
# An instance of which less is visible than this part of its area, or fewer pixels than that, is
# not annotated and not drawn.
_MIN_VISIBLE = 0.3
_MIN_PIXELS = 24


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth colour noise with stripes and grain, ``[size, size, 3]`` in 0 .. 255."""
    cells = int(rng.integers(2, 6))
    coarse = rng.uniform(30, 225, (cells, cells, 3)).astype(np.float32)
    image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 24)
    rows, columns = np.mgrid[:size, :size]
    phase = (columns * np.cos(angle) + rows * np.sin(angle)) * 2 * np.pi / period
    image += rng.uniform(0, 18) * np.sin(phase)[..., None]
    return image + rng.normal(0, 6, image.shape)


def _outline(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """Corners of one shape of class ``label`` in pixels, ``[N, 2]`` as x, y."""
    # Log-uniform: as many small shapes as large ones.
    radius = size * np.exp(rng.uniform(np.log(0.06), np.log(0.26)))
    center = rng.uniform(0.08 * size, 0.92 * size, 2)
    corners = {"circle": 48, "square": 4, "triangle": 3}[CLASSES[label]]
    angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
    return center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _fill(outline: np.ndarray, size: int) -> np.ndarray:
    """Coverage of each pixel by the outline, in 0 .. 1."""
    big = np.zeros((size * _SUPERSAMPLING,) * 2, np.float32)
    cv2.fillPoly(big, [np.round(outline * _SUPERSAMPLING).astype(np.int32)], 1.0)
    return cv2.resize(big, (size, size), interpolation=cv2.INTER_AREA)


def _paint(rng: np.random.Generator, image: np.ndarray, coverage: np.ndarray) -> None:
    size = image.shape[0]
    color = rng.uniform(20, 235, 3)
    shade = rng.uniform(-35, 35) * np.linspace(-1, 1, size)[:, None, None]
    texture = color + shade + rng.normal(0, 5, image.shape)
    image[:] = image * (1 - coverage[..., None]) + texture * coverage[..., None]


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """COCO polygons around a binary mask, one for each part.

    Contours run through pixel centres while COCO's polygons bound areas; drawing at twice the size
    puts the corners half a pixel outwards, so that the polygon rasterises to the mask again.
    Polygons cannot have holes, so a part with a hole is cut in two through it.
    """
    big = mask.repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True):
        if parent >= 0:
            columns = contour[:, 0, 0] // 2
            cut = int(columns.min() + columns.max() + 1) // 2
            left, right = mask.copy(), mask.copy()
            left[:, cut:] = 0
            right[:, :cut] = 0
            return _polygons(left) + _polygons(right)
    parts = []
    for contour in contours:
        points = (contour[:, 0, :].astype(np.float64) + 0.5) / 2
        if len(points) >= 3:
            parts.append([round(float(value), 2) for value in points.ravel()])
    return parts


def _scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image, ``[size, size, 3]`` uint8, and its instances without ids."""
    image = _background(rng, size)
    drawn: list[tuple[int, np.ndarray]] = []
    for _ in range(int(rng.integers(2, 8))):
        label = int(rng.integers(len(CLASSES)))
        coverage = _fill(_outline(rng, label, size), size)
        mask = coverage > 0.5
        # What the new shape would leave of those already there.
        left = [old & ~mask for _, old in drawn]
        enough = mask.sum() >= _MIN_PIXELS and all(
            rest.sum() >= max(_MIN_PIXELS, _MIN_VISIBLE * full.sum())
            for rest, (_, full) in zip(left, drawn, strict=True)
        )
        if not enough:
            continue
        _paint(rng, image, coverage)
        drawn = [(c, rest) for rest, (c, _) in zip(left, drawn, strict=True)] + [(label, mask)]
    instances = []
    for label, mask in drawn:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = float(columns[0]), float(rows[0])
        instances.append(
            dict(
                category_id=label + 1,
                bbox=[x, y, float(columns[-1]) + 1 - x, float(rows[-1]) + 1 - y],
                area=float(mask.sum()),
                iscrowd=0,
                segmentation=_polygons(mask.astype(np.uint8)),
            )
        )
    blurred = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 0.6)
    return np.clip(blurred, 0, 255).astype(np.uint8), instances


def generate_shapes(
    root: str | Path, num_train: int = 800, num_val: int = 120, image_size: int = 128,
    seed: int = 0,
) -> Path:  # fmt: skip
    """Write the set in COCO's layout; the same arguments give the same files.

    Image i of a split depends only on ``seed``, the split and i, so a larger set begins with the
    images of a smaller one.

    Args:
        root: Folder to write ``train2017/``, ``val2017/`` and
            ``annotations/instances_{train,val}2017.json`` in. An existing set is replaced if its
            arguments differ, else kept.
        num_train: Training images, at least 1.
        num_val: Validation images, at least 1.
        image_size: Height and width in pixels, at least 32.
        seed: Any integer from 0.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: A number below its minimum, or ``root`` contains something other than a
            generated set.
    """
    for name, value, least in (
        ("num_train", num_train, 1),
        ("num_val", num_val, 1),
        ("image_size", image_size, 32),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    root = Path(root)
    recipe = dict(num_train=num_train, num_val=num_val, image_size=image_size, seed=seed, version=1)
    stamp = root / "shapes.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == recipe:
        return root
    if root.is_dir() and any(root.iterdir()):
        if not (stamp.is_file() or (root / "shapes.incomplete").is_file()):
            raise ValueError(f"{root} is not empty and holds no generated set; name another folder")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / "shapes.incomplete").touch()
    (root / "annotations").mkdir()
    for split, count in (("train", num_train), ("val", num_val)):
        _write_split(root, split, count, image_size, seed)
    stamp.write_text(json.dumps(recipe))
    (root / "shapes.incomplete").unlink()
    return root


def _write_split(root: Path, split: str, count: int, image_size: int, seed: int) -> None:
    folder = root / f"{split}2017"
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, {"train": 0, "val": 1}[split], index])
        image, instances = _scene(rng, image_size)
        name = f"{index:012d}.png"
        if not cv2.imwrite(str(folder / name), image):
            raise OSError(f"cannot write {folder / name}")
        images.append(dict(id=index + 1, file_name=name, width=image_size, height=image_size))
        for instance in instances:
            annotations.append(dict(id=len(annotations) + 1, image_id=index + 1, **instance))
    content = dict(
        info=dict(description=f"mmrla shapes, {split}, seed {seed}"),
        images=images,
        annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
    )
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
