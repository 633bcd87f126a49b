"""``mmrla predict``: detection or classification of images, as pictures and as JSON."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.registry import DefaultScope
from tqdm import tqdm

from mmrla.engine.errors import exit_with_message
from mmrla.engine.inspection import choose_device, find_images
from mmrla.engine.network import Network, build_network, read_image
from mmrla.engine.report import draw_sample
from mmrla.engine.run.config import OptionAction

TOP = 5
"""Number of classes of a classifier that are drawn and written."""
MIN_SIDE = 480


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        "mmrla predict",
        description="Detect or classify what is in images: a picture of each, a line of text, and "
        "JSON on request.",
    )
    parser.add_argument("config", help="config file, or a name that mmrla list shows")
    parser.add_argument("checkpoint", help="weights of a detector or a classifier: file or URL")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or globs")
    parser.add_argument(
        "--out-dir", type=Path, default=Path("work_dirs/predict"), help="folder for the pictures"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to FILE")
    parser.add_argument(
        "--score-thr",
        type=float,
        help="leave out what scores less; default: 0.3 for a detector, 0 for a classifier, of "
        f"whose classes the best {TOP} count",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; default: a GPU if any")
    parser.add_argument(
        "--cfg-options", nargs="+", action=OptionAction, metavar="KEY=VALUE",
        help="override settings of the config",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Predict; exits with status 2 and one line if the input is wrong."""
    args = parse_args(argv)
    with exit_with_message():
        if args.score_thr is not None and not 0 <= args.score_thr <= 1:
            raise ValueError(f"--score-thr must be from 0 to 1, got {args.score_thr}")
        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"--json: no such folder: {args.json.absolute().parent}")
        images = find_images(args.images, option="IMAGE")
        for path in images:
            read_image(path)
        network = build_network(
            args.config, args.checkpoint, options=args.cfg_options, need_head=True,
            device=choose_device(args.device),
        )  # fmt: skip
        predictor = predictor_of(network, args.score_thr)
        args.out_dir.mkdir(parents=True, exist_ok=True)
        found = []
        bar = tqdm(images, disable=None)  # none in a file
        for path, picture in zip(bar, pictures(images, args.out_dir), strict=True):
            found.append({"image": str(path), **predictor(path, picture)})
            tqdm.write(f"{path}: {in_words(found[-1])} -> {picture}")
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1))


def pictures(images: Sequence[Path], folder: Path) -> list[Path]:
    """A PNG for each image, which is none of the images.

    Names that are taken are prefixed by the folder's name, then get a number.
    """
    taken = {path.resolve() for path in images}
    chosen = []
    for path in images:
        prefixed = f"{path.absolute().parent.name}_{path.stem}"
        names = chain([path.stem, prefixed], (f"{prefixed}_{number}" for number in count(2)))
        free = (folder / f"{name}.png" for name in names)
        chosen.append(next(picture for picture in free if picture.resolve() not in taken))
        taken.add(chosen[-1].resolve())
    return chosen


def in_words(found: dict[str, Any]) -> str:
    """``2 person, 1 dog``, or the best class with its score."""
    if "classes" in found:
        best = found["classes"][:1]
        return f"{best[0]['name']} {best[0]['score']:.2f}" if best else "nothing"
    counts = Counter(one["name"] for one in found["objects"])
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"


def predictor_of(network: Network, score_thr: float | None) -> Any:
    """A predictor for image files, which also writes the pictures.

    Raises:
        ValueError: The network is neither.
    """
    if hasattr(network.model, "head") and network.cfg.get("default_scope") == "mmpretrain":
        return Classifier(network, 0.0 if score_thr is None else score_thr)
    if network.cfg.get("default_scope") == "mmdet":
        return Detector(network, 0.3 if score_thr is None else score_thr)
    raise ValueError(f"{network.name}: neither a detector of mmdet nor a classifier of mmpretrain")


class Predictor:
    """A network with the names of its classes."""

    def __init__(self, network: Network, score_thr: float) -> None:
        self.network = network
        self.score_thr = score_thr
        self.names = list(network.dataset_meta.get("classes") or ())

    def name(self, label: int) -> str:
        """The class name of a label; its number if checkpoint and config do not name it."""
        while len(self.names) <= label:
            self.names.append(f"class {len(self.names)}")
        return self.names[label]


class Detector(Predictor):
    """Boxes and, if the network has them, masks, in pixels of the displayed image."""

    def __init__(self, network: Network, score_thr: float) -> None:
        from mmdet.visualization import DetLocalVisualizer

        super().__init__(network, score_thr)
        network.model.cfg = network.cfg
        self.visualizer = DetLocalVisualizer()

    def __call__(self, path: Path, picture: Path) -> dict[str, Any]:
        """Detect, and write the picture."""
        from mmdet.apis import inference_detector

        with DefaultScope.overwrite_default_scope("mmdet"):
            sample = inference_detector(self.network.model, str(path))
        instances = sample.pred_instances.cpu()
        instances = instances[instances.scores >= self.score_thr]
        sample.pred_instances = instances
        objects = [
            dict(label=label, name=self.name(label), score=score, box=box)
            for label, score, box in zip(
                instances.labels.tolist(),
                instances.scores.tolist(),
                instances.bboxes.tolist(),
                strict=True,
            )
        ]
        if "masks" in instances:
            for one, mask in zip(objects, instances.masks.numpy(), strict=True):
                one["mask"] = run_lengths(mask)
        palette = self.network.dataset_meta.get("palette")
        known = palette is not None and len(palette) >= len(self.names)
        self.visualizer.dataset_meta = dict(
            classes=self.names, palette=palette if known else "random"
        )
        # What scores less is gone already, and mmdet leaves out what scores as much.
        draw_sample(self.visualizer, sample, picture, MIN_SIDE, score_thr=-1.0)
        height, width = sample.ori_shape
        return dict(height=height, width=width, objects=objects)


class Classifier(Predictor):
    """The best classes and their scores."""

    def __init__(self, network: Network, score_thr: float) -> None:
        from mmpretrain.visualization import UniversalVisualizer

        super().__init__(network, score_thr)
        self.visualizer = UniversalVisualizer()

    def __call__(self, path: Path, picture: Path) -> dict[str, Any]:
        """Classify, and write the picture."""
        inputs, _ = self.network.read(path)
        with torch.no_grad():
            (sample,) = self.network.model(inputs, mode="predict")
        scores, labels = sample.pred_score.cpu().topk(min(TOP, sample.pred_score.numel()))
        labels = labels[scores >= self.score_thr]
        classes = [
            dict(label=label, name=self.name(label), score=score)
            for label, score in zip(labels.tolist(), scores.tolist(), strict=False)
        ]
        sample.set_pred_label(labels)
        image = mmcv.imconvert(mmcv.imread(str(path)), "bgr", "rgb")
        height, width = image.shape[:2]
        factor = max(1, -(-MIN_SIDE // min(height, width)))
        large = cv2.resize(
            image, (width * factor, height * factor), interpolation=cv2.INTER_NEAREST
        )
        self.visualizer.visualize_cls(
            large, sample, classes=self.names or None, draw_gt=False, out_file=str(picture)
        )
        return dict(height=height, width=width, classes=classes)


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask ``[H, W]`` in COCO's compressed form, which ``pycocotools.mask.decode`` reads."""
    from pycocotools.mask import encode

    code = encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(size=[int(side) for side in code["size"]], counts=code["counts"].decode())
