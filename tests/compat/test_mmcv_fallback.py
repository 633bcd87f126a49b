"""The fallback behind mmcv.ops against plain references, through mmcv's own functions."""

from __future__ import annotations

import importlib.util
import math
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction as Attention
from mmengine.utils.dl_utils import collect_env

from mmrla.compat import install_mmcv_fallback, ops_in_use
from tests.helpers import python

pytestmark = pytest.mark.skipif(
    ops_in_use() != "fallback", reason="mmcv's compiled extension is installed and in use"
)


def boxes(n: int, size: float = 60) -> torch.Tensor:
    corners = torch.rand(n, 2) * size
    return torch.cat([corners, corners + 1 + torch.rand(n, 2) * size / 2], dim=1)


def iou(a, b, offset: int) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    inter = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
    return inter / (sum(areas) - inter)


def assert_same(got, expected, leaves):
    """Outputs, and the gradients of leaves."""
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad(out, leaves, grad) for out in (got, expected))
    torch.testing.assert_close(mine, theirs)


# --- nms ---


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 57])
def test_nms(n, offset):
    b, scores = boxes(n), torch.rand(n)
    dets, kept = ops.nms(b, scores, iou_threshold=0.3, offset=offset)
    expected: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(b[i].tolist(), b[j].tolist(), offset) <= 0.3 for j in expected):
            expected.append(i)
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([b, scores[:, None]], dim=1)[expected])


def test_nms_offset_decides():
    """Two boxes whose overlap is 0.333 without the pixel of the offset and 0.375 with it."""
    b = torch.tensor([[0.0, 0, 10, 9], [5, 0, 15, 9]])
    scores = torch.tensor([0.9, 0.8])
    assert len(ops.nms(b, scores, iou_threshold=0.35, offset=0)[1]) == 2
    assert len(ops.nms(b, scores, iou_threshold=0.35, offset=1)[1]) == 1


def test_batched_nms_keeps_classes_apart():
    b = boxes(1).repeat(4, 1)
    scores, labels = torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([0, 0, 1, 1])
    _, kept = ops.batched_nms(b, scores, labels, dict(type="nms", iou_threshold=0.5))
    assert kept.tolist() == [1, 3]


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("n", [1, 40])
def test_soft_nms(n, method):
    b, scores = boxes(n, 30), torch.rand(n)
    how = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method)
    dets, kept = ops.soft_nms(b, scores, **how)
    left, expected = dict(enumerate(scores.tolist())), []
    while left:
        best = max(left, key=left.__getitem__)
        expected.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(b[best].tolist(), b[i].tolist(), 0)
            if method == "gaussian":
                left[i] *= math.exp(-(overlap**2) / 0.5)
            elif overlap >= 0.3:
                left[i] *= 1 - overlap if method == "linear" else 0
            if left[i] < 0.05:
                del left[i]
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[:, 4], torch.tensor([s for _, s in expected]))
    assert torch.equal(dets[:, :4], b[kept])


# --- region pooling ---


def bilinear(plane: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Value of ``[C, H, W]`` at one point; 0 further than one pixel outside, else clamped."""
    height, width = plane.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return plane.new_zeros(plane.shape[0])
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    top = plane[:, y0, x0] * (1 - fx) + plane[:, y0, x1] * fx
    bottom = plane[:, y1, x0] * (1 - fx) + plane[:, y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def roi_align_reference(features, rois, size, scale, sampling_ratio, aligned):
    """Mask R-CNN (ICCV 2017), section 3: the mean of samples in each bin."""
    out = features.new_zeros(len(rois), features.shape[1], *size)
    shift = 0.5 if aligned else 0.0
    for r, roi in enumerate(rois):
        x1, y1, x2, y2 = roi[1:] * scale - shift
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = w.clamp(min=1), h.clamp(min=1)
        bin_h, bin_w = h / size[0], w / size[1]
        ny = sampling_ratio or max(math.ceil(bin_h), 0)
        nx = sampling_ratio or max(math.ceil(bin_w), 0)
        for i in range(size[0]):
            for j in range(size[1]):
                ys = [y1 + (i + (p + 0.5) / ny) * bin_h for p in range(ny)]
                xs = [x1 + (j + (q + 0.5) / nx) * bin_w for q in range(nx)]
                samples = [bilinear(features[int(roi[0])], y, x) for y in ys for x in xs]
                out[r, :, i, j] = sum(samples) / max(len(samples), 1)
    return out


ROIS = torch.tensor(
    [[0, 4.0, 2.0, 30.0, 21.0], [1, -6, -3, 50, 40], [1, 10, 10, 10.4, 10.2], [0, 0, 7, 3, 31]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("size", [(7, 7), (3, 1)])
def test_roi_align(size, sampling_ratio, aligned):
    features = torch.randn(2, 3, 11, 13, dtype=torch.float64, requires_grad=True)
    got = ops.roi_align(features, ROIS, size, 0.25, sampling_ratio, "avg", aligned)
    expected = roi_align_reference(features, ROIS, size, 0.25, sampling_ratio, aligned)
    assert_same(got, expected, [features])


def test_roi_align_without_regions_and_in_low_precision():
    features = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = ops.RoIAlign((7, 7), 0.5)(features, torch.zeros(0, 5))
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))
    rois = ROIS.float()
    expected = ops.RoIAlign((7, 7), 0.25)(features, rois)
    for dtype in (torch.bfloat16, torch.float16):
        low = features.detach().to(dtype).requires_grad_()
        got = ops.RoIAlign((7, 7), 0.25)(low, rois.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)
        got.sum().backward()
        assert low.grad.dtype == dtype


def test_roi_pool():
    features = torch.randn(2, 3, 9, 10, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0, 0, 12.0, 12.0], [1, 4, 2, 19, 15]], dtype=torch.float64)
    got = ops.roi_pool(features, rois, (3, 2), 0.5)
    expected = []
    for roi in rois:  # Fast R-CNN (ICCV 2015), section 2.1
        x1, y1, x2, y2 = (round(float(v) * 0.5) for v in roi[1:])
        bin_h, bin_w = max(y2 - y1 + 1, 1) / 3, max(x2 - x1 + 1, 1) / 2
        for i in range(3):
            for j in range(2):
                rows = slice(max(y1 + math.floor(i * bin_h), 0), y1 + math.ceil((i + 1) * bin_h))
                cols = slice(max(x1 + math.floor(j * bin_w), 0), x1 + math.ceil((j + 1) * bin_w))
                expected.append(features[int(roi[0]), :, rows, cols].amax(dim=(1, 2)))
    expected = torch.stack(expected).view(2, 3, 2, 3).permute(0, 3, 1, 2)
    assert_same(got, expected, [features])
    assert ops.roi_pool(features, rois[:0], (3, 2), 0.5).shape == (0, 3, 3, 2)


# --- losses ---


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [0, 9])
def test_sigmoid_focal_loss(n, weighted):
    logits = (3 * torch.randn(n, 4, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, 5, (n,))  # 4 is background
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    got = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    p = logits.sigmoid()
    own = torch.cat([torch.ones(4) if weight is None else weight, torch.ones(1)])[target, None]
    hit = target[:, None] == torch.arange(4)
    expected = -torch.where(
        hit, 0.25 * (1 - p) ** 2 * p.log() * own, 0.75 * p**2 * (1 - p).log() * own
    )
    assert_same(got, expected, [logits])


def test_sigmoid_focal_loss_far_out():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, "sum")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx(0.75 * 200 + 0.25 * 200)


# --- deformable convolution ---


def deform_reference(
    x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups
):
    """Sum over taps of weight * mask * x(p + p_k + offset)."""
    b, _, h, w = x.shape
    c_out, per_group, kh, kw = weight.shape
    oh, ow = offset.shape[2:]
    offset = offset.view(b, deform_groups, kh * kw, 2, oh, ow)
    taps = []
    for k in range(kh * kw):
        y = torch.arange(oh)[:, None] * stride - padding + k // kw * dilation + offset[:, :, k, 0]
        x_ = torch.arange(ow) * stride - padding + k % kw * dilation + offset[:, :, k, 1]
        grid = torch.stack((2 * x_ / (w - 1) - 1, 2 * y / (h - 1) - 1), -1).flatten(0, 1)
        planes = x.reshape(b * deform_groups, -1, h, w)
        tap = F.grid_sample(planes, grid, align_corners=True)  # zero outside
        if mask is not None:
            tap = tap * mask.view(b, deform_groups, kh * kw, oh, ow)[:, :, k].flatten(0, 1)[:, None]
        taps.append(tap.reshape(b, groups, per_group, oh, ow))
    weight = weight.view(groups, c_out // groups, per_group, kh * kw)
    out = torch.einsum("kbgcij,gock->bgoij", torch.stack(taps), weight).flatten(1, 2)
    return out if bias is None else out + bias[:, None, None]


@pytest.mark.parametrize("modulated", [False, True])
def test_deform_conv(modulated):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weight, bias = leaf(2, 4, 5, 6), leaf(4, 2, 3, 3), leaf(4)
    offset, mask = leaf(2, 2 * 2 * 9, 3, 3), leaf(2, 2 * 9, 3, 3)
    geometry = (2, 1, 1, 2, 2)  # stride, padding, dilation, groups, deform groups
    if modulated:
        leaves = [x, offset, mask, weight, bias]
        got = ops.modulated_deform_conv2d(*leaves, *geometry)
        expected = deform_reference(*leaves, *geometry)
    else:
        leaves = [x, offset, weight]
        got = ops.deform_conv2d(*leaves, *geometry)
        expected = deform_reference(x, offset, None, weight, None, *geometry)
    assert_same(got, expected, leaves)


def test_deform_conv_without_offset_is_a_convolution():
    x, weight = torch.randn(1, 3, 7, 5), torch.randn(2, 3, 3, 3)
    got = ops.modulated_deform_conv2d(
        x, torch.zeros(1, 18, 7, 5), torch.ones(1, 9, 7, 5), weight, None, 1, 1
    )
    torch.testing.assert_close(got, F.conv2d(x, weight, padding=1), atol=1e-5, rtol=1e-4)


def multi_scale_reference(value, shapes, locations, weights):
    """Deformable DETR (ICLR 2021), Eq. 3, one sample at a time; outside of a map is zero."""
    batch, queries, heads, levels, points = weights.shape
    channels = value.shape[-1]
    maps = value.split([h * w for h, w in shapes], dim=1)
    out = value.new_zeros(batch, queries, heads, channels)
    for b, q, m, level, k in np.ndindex(batch, queries, heads, levels, points):
        h, w = shapes[level]
        plane = F.pad(maps[level][b, :, m].T.reshape(channels, h, w), (2, 2, 2, 2))
        x, y = locations[b, q, m, level, k]
        # Pixel centres lie at half pixels; two pixels are padding.
        sample = bilinear(plane, y * h + 1.5, x * w + 1.5)
        out[b, q, m] = out[b, q, m] + weights[b, q, m, level, k] * sample
    return out.flatten(2)


def test_multi_scale_deformable_attention():
    """The function that mmcv calls on a GPU, whose kernel is the fallback's."""
    shapes, double = [(4, 5), (2, 3)], torch.float64
    value = torch.randn(2, 26, 2, 3, dtype=double, requires_grad=True)
    # Some samples lie outside, as those that a network asks for do.
    locations = (torch.rand(2, 4, 2, 2, 3, 2, dtype=double) * 1.3 - 0.15).requires_grad_()
    weights = torch.rand(2, 4, 2, 2, 3, dtype=double, requires_grad=True)
    leaves = [value, locations, weights]
    starts = torch.tensor([0, 20])
    got = Attention.apply(value, torch.tensor(shapes), starts, locations, weights, 64)
    expected = multi_scale_reference(value, shapes, locations, weights)
    assert_same(got, expected, leaves)
    half = [x.detach().half() for x in leaves]
    low = Attention.apply(half[0], torch.tensor(shapes), starts, half[1], half[2], 64)
    assert low.dtype == torch.half
    torch.testing.assert_close(low.double(), expected.detach(), atol=0.05, rtol=0.05)


# --- which is in use ---


def test_other_ops_say_what_to_do():
    with pytest.raises(
        NotImplementedError, match="mmcv op box_iou_rotated needs .*install mmcv wi"
    ):
        ops.box_iou_rotated(torch.rand(1, 5), torch.rand(1, 5))
    with pytest.raises(NotImplementedError, match="roi_align with pool_mode='max'"):
        ops.roi_align(torch.rand(1, 1, 4, 4), ROIS[:1].float(), 2, 1.0, 0, "max", True)


def test_the_module_has_a_real_spec_and_probes_find_it():
    import mmcv._ext as ext

    assert ext.__spec__.name == "mmcv._ext"
    assert importlib.util.find_spec("mmcv._ext") is not None
    assert not hasattr(ext, "__path__")
    assert "fallback" in collect_env().get("MMCV Compiler", "fallback")
    assert "fallback" in ops.get_compiler_version()


def test_a_compiled_extension_is_preferred(tmp_path):
    """With an `_ext` in mmcv's folders the finder is never asked, whoever was imported first."""
    (tmp_path / "_ext.py").write_text("marker = 1\n")
    code = (
        f"import mmrla, mmcv; mmcv.__path__.append({str(tmp_path)!r}); "
        "from mmrla.compat import ops_in_use; import mmcv._ext as e; print(ops_in_use(), e.marker)"
    )
    assert python("-c", code, cwd=tmp_path).split() == ["compiled", "1"]


def test_importing_twice_installs_one_finder():
    before = list(sys.meta_path)
    install_mmcv_fallback()
    assert sys.meta_path == before


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is not None
    and int(version("transformers").partition(".")[0]) > 4,
    reason="mmpretrain's models do not import with transformers 5 unless mmrla comes first",
)
def test_mm_packages_may_be_imported_first(tmp_path):
    """What they put in the place of missing operations is put right: a detector detects."""
    code = """
import sys, types
import torch
import mmpretrain.models
mmseg = sys.modules["mmseg.losses"] = types.ModuleType("mmseg.losses")
mmseg._sigmoid_focal_loss = mmseg.PSAMask = mmseg.ours = None
try:
    import mmdet.models
except ModuleNotFoundError:  # mmcv._ext: too early
    pass
import mmrla
from mmdet.models.dense_heads import base_dense_head
from mmdet.structures.mask import BitmapMasks
import mmcv.ops, numpy as np

assert mmseg._sigmoid_focal_loss is mmcv.ops.sigmoid_focal_loss
assert (mmseg.PSAMask, mmseg.ours) == (mmcv.ops.PSAMask, None)
boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]])
cfg = dict(type="nms", iou_threshold=0.5)
print(len(base_dense_head.batched_nms(boxes, torch.rand(2), torch.zeros(2), cfg)[1]))
masks = BitmapMasks(np.ones((1, 8, 8), np.uint8), 8, 8)
print(masks.crop_and_resize(0.5 * boxes[:1], (4, 4), torch.zeros(1, dtype=int), "cpu").masks.sum())
"""
    assert python("-c", code, cwd=tmp_path).split()[-2:] == ["1", "16"]


def test_numpy_in_numpy_out():
    dets, kept = ops.nms(boxes(5).numpy(), np.random.rand(5).astype(np.float32), 0.5)
    assert isinstance(dets, np.ndarray)
    assert isinstance(kept, np.ndarray)
