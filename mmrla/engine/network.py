"""A config's network with its weights and image preprocessing, in evaluation mode."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import Tensor, nn

import mmrla.registry  # noqa: F401
from mmrla.analysis.modules import layer_attentions
from mmrla.checkpoints import compare, load_file, state_dict_of
from mmrla.checkpoints.report import allowed_heads
from mmrla.engine.data.config import datasets_of, type_name
from mmrla.engine.run import config
from mmrla.engine.run.checks import quiet_logger


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def read_image(path: str | Path) -> np.ndarray:
    """An image file as ``[H, W, 3]`` of uint8 in BGR.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such image: {Path(path).absolute()}")
    data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise ValueError(f"not an image that OpenCV can read: {Path(path).absolute()}")
    return image


@dataclass
class Network:
    """A config's model in evaluation mode, with its image preprocessing."""

    model: Any
    cfg: Config
    name: str
    """The config's name, and whether it is its plain host."""
    weights: str
    """``checkpoint NAME`` or ``random weights (seed N)``, for a figure's title."""
    device: torch.device
    pipeline: Compose
    rgb: bool
    """Whether the pipeline takes RGB."""
    dataset_meta: dict[str, Any]
    """Class names and other metadata: the checkpoint's, else those of the config's test set."""

    @property
    def title(self) -> str:
        """Name and weights on one line."""
        return f"{self.name}, {self.weights}"

    @property
    def stem(self) -> str:
        """Prefix of the names of its result files."""
        return self.name.replace(" ", "_")

    @property
    def label(self) -> str:
        """The class of its layer attention, or ``plain``."""
        names = layer_attentions(self.model)
        return type(self.model.get_submodule(names[0])).__name__ if names else "plain"

    @property
    def backbone(self) -> nn.Module:
        """The model's backbone."""
        return self.model.backbone

    def read(self, path: str | Path) -> tuple[Tensor, np.ndarray]:
        """Read an image file as the network's input.

        Returns:
            Its input ``[1, 3, H, W]``, normalised, on the device; and the image that was cut from
            the file, ``[H', W', 3]`` of uint8 in RGB, before normalisation and padding.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not an image.
        """
        image = read_image(path)
        if self.rgb:
            image = np.ascontiguousarray(image[..., ::-1])
        shape = image.shape[:2]
        with DefaultScope.overwrite_default_scope(self.cfg.get("default_scope", "mmengine")):
            packed = self.pipeline(
                dict(img=image, img_shape=shape, ori_shape=shape, img_path=str(path), img_id=0)
            )["inputs"]
        shown = packed.permute(1, 2, 0).numpy()
        return (
            preprocess(self.model, [packed]),
            np.ascontiguousarray(shown if self.rgb else shown[..., ::-1]),
        )

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Any:
        """Compute features of images ``[B, 3, H, W]``."""
        return extract_features(self.model, inputs)


def preprocess(model: Any, images: Sequence[Tensor] | Tensor) -> Tensor:
    """Turn images from a data loader, ``[3, H, W]`` each, into the model's input."""
    data = dict(inputs=images, data_samples=None)
    return model.data_preprocessor(data, False)["inputs"]


def extract_features(model: Any, inputs: Tensor) -> Any:
    """Run a detector or classifier without its head, or a bare backbone."""
    return (getattr(model, "extract_feat", None) or getattr(model, "backbone", model))(inputs)


def read_config(path: str, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config of a model, and override settings.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: It has no model with a backbone.
    """
    cfg = config.read_config(path, options)
    if "backbone" not in (cfg.get("model") or {}):
        raise ValueError(f"{path}: not a config of a classifier or detector, it has no backbone")
    config.fit_classes(cfg)
    return cfg


def plain_model(model: ConfigDict) -> ConfigDict:
    """The config of the same network without layer attention and plugins.

    Raises:
        ValueError: The backbone takes no layer attention.
    """
    if not _is_host(model.backbone):
        raise ValueError(
            f"model.backbone {model.backbone.type!r} has no layer attention to leave out; use a "
            "config whose backbone is one of mmrla's"
        )
    return without_layer_attention(model)


def _is_host(backbone: ConfigDict) -> bool:
    """Whether a backbone's class is one of mmrla's hosts, or derives from one."""
    from mmrla.models.host import LayerAttentionHost

    kind = backbone.type
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    return isinstance(cls, type) and issubclass(cls, LayerAttentionHost)


def without_layer_attention(model: ConfigDict) -> ConfigDict:
    """As :func:`plain_model`; for a backbone without layer attention, the network itself."""
    from mmrla.layers import RecurrentLayerAggregation
    from mmrla.models.builder import layer_attention_class

    model = copy.deepcopy(model)
    model.backbone.pop("plugins", None)
    attention = model.backbone.get("layer_attention")
    if _is_host(model.backbone):
        model.backbone.layer_attention = None  # also in place of the host's default
    if attention is None:
        return model
    appends = issubclass(layer_attention_class(attention), RecurrentLayerAggregation)
    if appends and attention.get("concat_output", True) and model.get("head"):
        # Its hidden map is appended to what the head sees.
        model.head.in_channels -= attention.get("hidden_channels", 32)
    return model


def build_network(
    path: str, checkpoint: str | None = None, *, options: Mapping[str, Any] | None = None,
    plain: bool = False, seed: int = 0, device: torch.device | str = "cpu", size: int | None = None,
    need_head: bool = False,
) -> Network:  # fmt: skip
    """Build a config's model with its weights, for analysis.

    Args:
        path: The config.
        checkpoint: A file or URL; None: random weights, nothing is downloaded.
        options: Settings that override the config's.
        plain: Leave the layer attention out.
        seed: Of the random weights.
        device: Where the model goes.
        size: Of images, see :func:`add_image_arguments`; None: as the config's test pipeline.
        need_head: Whether a checkpoint must contain the head too.

    Raises:
        FileNotFoundError: No such config or checkpoint.
        ValueError: The config has no backbone, or ``plain`` is set and the backbone is not mmrla's;
            the checkpoint cannot be read safely, or would leave parts of the model random.
    """
    cfg = read_config(path, options)
    model_cfg = plain_model(cfg.model) if plain else copy.deepcopy(cfg.model)
    _drop_pretrained(model_cfg)
    if cfg.get("data_preprocessor") is not None:
        model_cfg.setdefault("data_preprocessor", cfg.data_preprocessor)
    state, meta = None, None
    if checkpoint is not None:
        if "://" not in checkpoint and not Path(checkpoint).is_file():
            raise FileNotFoundError(f"no such checkpoint: {Path(checkpoint).absolute()}")
        loaded = load_file(checkpoint)
        state = state_dict_of(loaded)
        meta = (loaded.get("meta") or {}).get("dataset_meta")
    seed_everything(seed)
    scope = cfg.get("default_scope", "mmengine")
    with DefaultScope.overwrite_default_scope(scope), quiet_logger():
        model = MODELS.build(model_cfg)
        if state is None:
            model.init_weights()  # which logs a paragraph for each parameter
    if state is not None:
        report, fitting = compare(model, state)
        allowed = [] if need_head else allowed_heads(report, state)
        report.require(str(checkpoint), allowed, model, state)
        model.load_state_dict(fitting, strict=False)
    pipeline, rgb = _pipeline(cfg, size)
    return Network(
        model=model.to(device).eval(), cfg=cfg,
        name=Path(path).stem + (" without layer attention" if plain else ""),
        weights=f"random weights (seed {seed})" if state is None else Path(str(checkpoint)).name,
        device=torch.device(device), pipeline=pipeline, rgb=rgb,
        dataset_meta={k.lower(): v for k, v in (meta or _dataset_meta(cfg)).items()},
    )  # fmt: skip


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    """Metadata from the test set's class and config; no file is read."""
    with DATASETS.switch_scope_and_registry(cfg.get("default_scope")) as registry:
        for _, dataset in datasets_of(cfg, ["test"]):
            kind = dataset["type"]
            cls = registry.get(kind) if isinstance(kind, str) else kind
            return {**getattr(cls, "METAINFO", {}), **(dataset.get("metainfo") or {})}
    return {}


def _drop_pretrained(node: Any) -> None:
    """Remove pretrained weights from the config: a checkpoint provides all of them, or none."""
    if isinstance(node, Mapping):
        init = node.get("init_cfg")
        entries = init if isinstance(init, (list, tuple)) else [init]
        if any(isinstance(e, Mapping) and "checkpoint" in e for e in entries) or any(
            isinstance(e, Mapping)
            and str(e.get("type")).rpartition(".")[2] in ("Pretrained", "WarmStart")
            for e in entries
        ):
            node["init_cfg"] = None  # type: ignore[index]
        if node.get("pretrained") is not None:
            node["pretrained"] = None  # type: ignore[index]
        for value in node.values():
            _drop_pretrained(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _drop_pretrained(value)


def _steps(cfg: Config, split: str) -> list[dict]:
    dataset = (cfg.get(f"{split}_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]
    return list(dataset.get("pipeline") or ())


def _pipeline(cfg: Config, size: int | None) -> tuple[Compose, bool]:
    """The pipeline from an image array to a network's input, and whether the array is RGB."""
    scope = cfg.get("default_scope", "mmengine")
    steps = _steps(cfg, "test")
    if not steps:
        raise ValueError(f"{cfg.filename}: no test_dataloader with a pipeline for images")
    # Where no step reads a file, as with CIFAR, the dataset gives arrays, and those are RGB.
    rgb = not any(type_name(step).startswith("LoadImage") for step in steps)
    steps = [copy.deepcopy(step) for step in steps if not type_name(step).startswith("Load")]
    if size is None and rgb and not any("scale" in s or "crop_size" in s for s in steps):
        crops = [step["crop_size"] for step in _steps(cfg, "train") if "crop_size" in step]
        if not crops or not isinstance(crops[-1], int):
            raise ValueError(f"{cfg.filename}: its pipelines do not set an image size; pass --size")
        size = crops[-1]
    if size is not None:
        if size < 1:
            raise ValueError(f"--size must be at least 1, got {size}")
        pack = steps[-1]
        if scope == "mmpretrain":
            resize = dict(type="ResizeEdge", scale=size, edge="short")
            steps = [resize, dict(type="CenterCrop", crop_size=size), pack]
        else:
            steps = [dict(type="Resize", scale=(8 * size, size), keep_ratio=True), pack]
    if type_name(steps[-1]) == "PackDetInputs":
        steps[-1]["meta_keys"] = ("img_path", "ori_shape", "img_shape")
    with DefaultScope.overwrite_default_scope(scope):
        return Compose(steps), rgb


def share_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights that both have from ``source`` to ``target``, for random weights."""
    own = target.state_dict()
    shared = {
        key: value
        for key, value in source.state_dict().items()
        if key in own and own[key].shape == value.shape
    }
    target.load_state_dict(shared, strict=False)
