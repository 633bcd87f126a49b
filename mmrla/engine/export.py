"""Exports networks to ONNX, and compares onnxruntime's outputs with torch's."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from torch import Tensor, nn

from mmrla.engine.network import Network
from mmrla.ops.dispatch import forced_backend

OPSET = 18
PARTS = ("backbone", "model", "detector")


class Flat(nn.Module):
    """A network whose outputs are one flat tuple of tensors."""

    def __init__(self, function: Any, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images ``[B, 3, H, W]`` to all tensors of the output, in order."""
        return tuple(_tensors(self.function(x)))


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = list(found.values())
    return [tensor for part in found for tensor in _tensors(part)]


def exportable(network: Network, part: str) -> Flat:
    """The part of a network to export.

    Args:
        network: In evaluation mode.
        part: ``'backbone'``: its feature maps; ``'model'``: a classifier's scores before softmax,
            or a single-stage detector's maps of scores and boxes, without decoding and NMS. For
            ``'detector'``, boxes, see :class:`mmrla.engine.detection_graph.DetectorGraph`.

    Raises:
        ValueError: An unknown part, or a two-stage detector's ``'model'``.
    """
    if part not in PARTS[:2]:
        raise ValueError(f"part must be one of {PARTS[:2]}, got {part!r}")
    model = network.model
    if part == "backbone":
        return Flat(model.backbone, model.backbone)
    if hasattr(model, "roi_head") or hasattr(model, "rpn_head"):
        raise ValueError(
            f"{type(model).__name__} of {network.name} has no maps of scores and boxes without its "
            "proposals; export the detector with boxes (--part detector), or its backbone"
        )
    return Flat(lambda x: model(x, mode="tensor"), model)


def export_onnx(
    network: nn.Module, path: str | Path, size: tuple[int, int], dynamic: bool = True,
    others: Mapping[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write a network as ONNX, by torch's exporter.

    Layer attentions are exported as plain operations (their naive backend), which any runtime
    supports.

    Args:
        network: In evaluation mode, on the CPU. Its ``output_names``, if any, name the outputs.
        path: The file, ``.onnx``.
        size: H and W of the images used for tracing.
        dynamic: Make batch, H and W dynamic; else the graph takes one image of ``size``.
        others: Further inputs of fixed shapes, by name; only with ``dynamic=False``.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        ValueError: ``path`` does not end in ``.onnx``, or the network's graph depends on the size
            although ``dynamic`` is True.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"the file must end in .onnx, got {path.name!r}")
    require("onnx", "onnxscript")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = torch.zeros(2 if dynamic else 1, 3, *size)
    inputs = dict(others or {})
    open_axis = torch.export.Dim.DYNAMIC
    axes = {0: open_axis, 2: open_axis, 3: open_axis}
    with (
        forced_backend("naive"),
        mock.patch.object(Conv2dAdaptivePadding, "forward", _pad_same),
        warnings.catch_warnings(),
        redirect_stderr(StringIO()),  # torch prints whole graphs that it gives up on
    ):
        warnings.simplefilter("ignore")
        try:  # inside torch.onnx.export, a branch on the size may become an assert that it drops
            program = torch.export.export(
                network, (images, *inputs.values()), strict=False,
                dynamic_shapes=(axes,) if dynamic else None,
            )  # fmt: skip
        except Exception as error:  # of many types, some of them private
            if not dynamic:
                raise
            module = getattr(network, "module", network)
            host = type(getattr(module, "backbone", module)).__name__
            raise ValueError(
                f"{host} cannot be exported with batch, H and W left open; ask for one size "
                f"(--static). torch says: {' '.join(str(error).split())[:300]}"
            ) from error
        torch.onnx.export(
            program, (), str(path), input_names=["images", *inputs],
            output_names=getattr(network, "output_names", None), opset_version=OPSET,
            dynamo=True, verbose=False, external_data=False,
        )  # fmt: skip
    return path


def _pad_same(conv: Conv2dAdaptivePadding, x: Tensor) -> Tensor:
    """SAME padding of EfficientNets without a branch on the size, which torch cannot make dynamic.

    For an odd kernel of radius p, one side is padded by p; the other too at stride 1, and at stride
    2 by one less if the size is even.
    """
    pads = []
    for axis in (1, 0):  # F.pad begins with the last axis
        kernel, stride = conv.kernel_size[axis], conv.stride[axis]
        if kernel % 2 == 0 or stride > min(2, kernel):
            return _FORWARD(conv, x)
        reach = conv.dilation[axis] * (kernel - 1) // 2
        pads += [reach if stride == 1 else reach - 1 + x.shape[2 + axis] % 2, reach]
    x = F.pad(x, pads)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


_FORWARD = Conv2dAdaptivePadding.forward


def onnx_error(
    path: str | Path, network: Flat, sizes: Sequence[tuple[int, int]], batch: int = 1
) -> list[float]:
    """Differences between onnxruntime's outputs and torch's, on random images of each size.

    Returns:
        For each size the largest absolute difference of any output, over that output's largest
        absolute value.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    session = session_of(path)
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        images = torch.rand(batch, 3, *size, generator=generator) * 4 - 2
        with torch.no_grad():
            expected = network(images)
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        errors = [
            (torch.from_numpy(got) - want).abs().max() / want.abs().max().clamp(min=1e-30)
            for got, want in zip(outputs, expected, strict=True)
        ]
        found.append(max(error.item() for error in errors))
    return found


def quantize_int8(path: str | Path, images: Sequence[Tensor]) -> Path:
    """Write convolutions and matrix products in int8, by onnxruntime's static quantisation.

    Weights get a scale per channel, activations one per tensor, from the largest values on
    ``images``. All else, the attention over layers too, stays in float32. Weights keep 7 bits:
    with 8, processors without VNNI add up products in 16 bits, which overflow.

    Returns:
        The new file, ``*_int8.onnx``, beside ``path``.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    require("onnx", "onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            return next(({"images": one.numpy()} for one in self.left), None)

    path = Path(path)
    written = path.with_name(f"{path.stem}_int8.onnx")
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, written, Reader(), per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )  # fmt: skip
    return written


class Int8Agreement(NamedTuple):
    """A graph in int8 beside the one in float32."""

    same_class: int
    """Images whose best class is the same."""
    error: float
    """Root mean square of the differences of outputs, over that of the outputs."""
    speed: float
    """Time of float32 over time of int8, medians of interleaved runs."""


def int8_agreement(
    path: str | Path, quantized: str | Path, images: Sequence[Tensor], rounds: int = 5
) -> Int8Agreement:
    """Compare a graph of :func:`quantize_int8` with its source on inputs ``[1, 3, H, W]`` each."""
    sessions = [session_of(file) for file in (path, quantized)]
    same, wrong, whole = 0, 0.0, 0.0
    for image in images:
        wanted, got = (s.run(None, {"images": image.numpy()})[0] for s in sessions)
        same += int(wanted.argmax() == got.argmax())
        wrong += float(((wanted - got) ** 2).mean())
        whole += float((wanted**2).mean())
    times: list[list[float]] = [[], []]
    for image in [images[0]] * (2 * rounds):
        for session, spent in zip(sessions, times, strict=True):
            start = perf_counter()
            session.run(None, {"images": image.numpy()})
            spent.append(perf_counter() - start)
    return Int8Agreement(same, (wrong / whole) ** 0.5, median(times[0]) / median(times[1]))


def session_of(path: str | Path) -> Any:
    """Onnxruntime's session of a graph, on the CPU."""
    require("onnxruntime")
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def require(*names: str) -> None:
    """Raise ModuleNotFoundError, with what to install, where a package of these is missing."""
    for name in names:
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'exporting needs {name}, which is not installed: pip install "mmrla[onnx]"'
            ) from error
