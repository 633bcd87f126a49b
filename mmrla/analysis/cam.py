"""ScoreCAM of a classifier, by the library grad-cam.

Paper: Score-CAM, CVPR workshops 2020, https://arxiv.org/abs/1910.01279.
"""

from __future__ import annotations

from math import isqrt
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm


class Logits(nn.Module):
    """A classifier of mmpretrain as a function of images only."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` to ``[B, classes]``."""
        logits = self.classifier(x, mode="tensor")
        return logits[-1] if isinstance(logits, (tuple, list)) else logits


def feature_layer(model: Any, name: str, inputs: Tensor) -> nn.Module:
    """The module whose output is used for a class activation map.

    Args:
        model: A classifier.
        name: Of the module, in the backbone or in the whole model.
        inputs: ``[B, 3, H, W]``, run once to inspect the module's output.

    Raises:
        ValueError: There is no such module, it is not called, or its output is neither a map nor
            tokens of a square grid.
    """
    for root in (model.backbone, model):
        modules = dict(root.named_modules())
        if name and name in modules:
            break
    else:
        some = [child for child, _ in model.backbone.named_children()]
        raise ValueError(
            f"no layer {name!r} in {type(model.backbone).__name__}; on top there are "
            f"{', '.join(some)}, and parts of these as layer1.0"
        )
    outputs: list[Any] = []
    handle = modules[name].register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        with torch.no_grad():
            model.extract_feat(inputs)
    finally:
        handle.remove()
    if not outputs:
        raise ValueError(f"layer {name!r} is not called by {type(model.backbone).__name__}")
    try:
        as_map(outputs[0], _extra_tokens(model))
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    return modules[name]


def as_map(output: Any, extra: int) -> Tensor:
    """A module's output as ``[B, C, H, W]``: a map, tokens, or a tuple that begins with one.

    Args:
        output: Of the module.
        extra: Tokens before those of patches.

    Raises:
        ValueError: It is none of these.
    """
    found = output[0] if isinstance(output, (tuple, list)) else output
    if isinstance(found, Tensor) and found.dim() == 4:
        return found
    if isinstance(found, Tensor) and found.dim() == 3:
        side = isqrt(max(found.shape[1] - extra, 0))
        if side and side**2 == found.shape[1] - extra:
            return found[:, extra:].transpose(1, 2).unflatten(2, (side, side))
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(f"its output is neither a map nor a square grid of tokens, got {shape}")


def _extra_tokens(model: Any) -> int:
    return int(getattr(model.backbone, "num_extra_tokens", 0))


def score_cam(
    model: Any, layer: nn.Module, inputs: Tensor, target: int, batch_size: int = 32
) -> np.ndarray:
    """ScoreCAM of one image: channels of the layer mask it and are weighted by their scores.

    Runs the model once for each channel.

    Args:
        model: A classifier of mmpretrain in evaluation mode.
        layer: As :func:`feature_layer` gives it.
        inputs: ``[1, 3, H, W]``.
        target: The class.
        batch_size: Number of masked images per forward.

    Returns:
        ``[H, W]`` in [0, 1]: contribution of each position to the class, over the maximum.

    Raises:
        ImportError: grad-cam is not installed.
    """
    try:
        import pytorch_grad_cam.score_cam as library
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError(
            f"ScoreCAM needs grad-cam: pip install 'mmrla[analysis]' ({error})"
        ) from error

    class Lean(library.ScoreCAM):
        def get_cam_weights(self, *args: Any, **kwargs: Any) -> np.ndarray:
            # Its hooks would keep the layer's output of every masked image as well.
            self.activations_and_grads.release()
            return super().get_cam_weights(*args, **kwargs)

    extra = _extra_tokens(model)
    cam = Lean(Logits(model), [layer], lambda output: as_map(output, extra))
    cam.batch_size = batch_size
    # The library's own bar, under that of the command and gone when it is done.
    bars = mock.Mock(tqdm=lambda steps: tqdm(steps, desc="masks", leave=False, position=1))
    try:
        with torch.no_grad(), mock.patch.object(library, "tqdm", bars):
            return cam(inputs, [ClassifierOutputTarget(target)])[0]
    finally:
        cam.activations_and_grads.release()
