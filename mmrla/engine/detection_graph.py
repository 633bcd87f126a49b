"""Detectors as graphs of fixed shapes, from an image to boxes, and their difference from mmdet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
import torchvision
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmrla.engine.export import export_onnx, session_of
from mmrla.engine.network import Network, preprocess, read_image

CANDIDATES = 4096
"""The best pairs of a proposal and a class that reach the NMS of a two-stage detector."""
OUTPUTS = ("boxes", "scores", "labels", "masks")


class DetectorGraph(nn.Module):
    """A detector of mmdet whose outputs have the same shapes for every image.

    Proposals and boxes that mmdet drops, by NMS or because of a low score, remain as rows with a
    score of 0, after the valid rows. Boxes, scores and labels are those of mmdet, except that no
    more than :data:`CANDIDATES` pairs of proposal and class enter a two-stage detector's NMS.

    Args:
        network: A detector like RetinaNet (anchors; classes and boxes per level), or Faster or Mask
            R-CNN, in evaluation mode.

    Raises:
        ValueError: The detector is none of these.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        _check_kind(network)
        self.model = network.model
        self.dense_head = getattr(self.model, "rpn_head", None) or self.model.bbox_head
        self.roi_head: Any = getattr(self.model, "roi_head", None)
        self.output_names = OUTPUTS[: 4 if self.roi_head and self.roi_head.with_mask else 3]

    def forward(self, images: Tensor, image_shape: Tensor) -> tuple[Tensor, ...]:
        """Detect in one image.

        Args:
            images: ``[1, 3, H, W]``, normalised, with zeros right of and below the image.
            image_shape: H and W of the image without these zeros, ``[2]``, int64.

        Returns:
            Boxes ``[N, 4]`` as x1, y1, x2, y2 in pixels of ``images``, descending scores ``[N]``,
            labels ``[N]`` from 0, and for Mask R-CNN ``[N, h, w]``, the probability that each cell
            of a grid over the box belongs to the object. Rows with score 0 are padding.
        """
        features = self.model.extract_feat(images)
        limits = image_shape.flip(0).repeat(2).to(images.dtype)
        found = self._dense(features, limits)
        if self.roi_head is None:
            return found
        boxes, scores, _ = found
        boxes, scores, labels = self._second_stage(features, boxes, scores, limits)
        if not self.roi_head.with_mask:
            return boxes, scores, labels
        pooled = _pool(self.roi_head.mask_roi_extractor, features, boxes)
        head = self.roi_head.mask_head
        masks = head(pooled).sigmoid()
        rows = torch.arange(len(masks))
        masks = masks[:, 0] if head.class_agnostic else masks[rows, labels]
        return boxes, scores, labels, masks

    def _dense(self, features: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, ...]:
        """Boxes, scores and labels of RetinaNet, or the proposals of an RPN."""
        head, cfg = self.dense_head, self.dense_head.test_cfg
        score_maps, delta_maps = head(features)
        sizes = [tuple(level.shape[-2:]) for level in score_maps]
        anchors = head.prior_generator.grid_priors(sizes, device="cpu")
        boxes, scores, labels, groups = [], [], [], []
        for level, priors in enumerate(anchors):
            logits = score_maps[level][0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            level_scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(1)[:, :-1]
            classes = level_scores.shape[1]
            deltas = delta_maps[level][0].permute(1, 2, 0).reshape(-1, 4)
            count = level_scores.numel()
            limit = cfg.get("nms_pre", -1)
            best, index = level_scores.flatten().topk(min(limit, count) if limit > 0 else count)
            anchor, label = index // classes, index % classes
            boxes.append(_decode(head.bbox_coder, priors[anchor], deltas[anchor], limits))
            scores.append(best)
            labels.append(label)
            groups.append(torch.full_like(label, level) if self.roi_head else label)
        return _suppress(
            torch.cat(boxes), torch.cat(scores), torch.cat(labels), torch.cat(groups), cfg
        )

    def _second_stage(
        self, features: Sequence[Tensor], proposals: Tensor, objectness: Tensor, limits: Tensor
    ) -> tuple[Tensor, ...]:
        """Boxes, scores and labels from proposals ``[R, 4]``; those of objectness 0 are ignored."""
        head, cfg = self.roi_head.bbox_head, self.roi_head.test_cfg
        logits, deltas = head(_pool(self.roi_head.bbox_roi_extractor, features, proposals))
        scores = logits.softmax(1)[:, :-1] * (objectness > 0)[:, None]
        classes = scores.shape[1]
        best, index = scores.flatten().topk(min(CANDIDATES, scores.numel()))
        proposal, label = index // classes, index % classes
        deltas = deltas.reshape(len(proposals), -1, 4)
        deltas = deltas[proposal, 0 if head.reg_class_agnostic else label]
        boxes = _decode(head.bbox_coder, proposals[proposal], deltas, limits)
        return _suppress(boxes, best, label, label, cfg)


def _decode(coder: Any, anchors: Tensor, deltas: Tensor, limits: Tensor) -> Tensor:
    from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import delta2bbox

    boxes = delta2bbox(
        anchors, deltas, coder.means, coder.stds, None, 16 / 1000, coder.clip_border,
        coder.add_ctr_clamp, coder.ctr_clamp,
    )  # fmt: skip
    return torch.minimum(boxes.clamp(min=0), limits) if coder.clip_border else boxes


def _suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, groups: Tensor, cfg: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes after NMS within each group, ``max_per_img`` rows; those left out score 0."""
    scores = torch.where(scores > cfg.get("score_thr", 0), scores, 0)
    if cfg.get("min_bbox_size", -1) >= 0:
        sides = boxes[:, 2:] - boxes[:, :2]
        scores = torch.where((sides > cfg.min_bbox_size).all(1), scores, 0)
    # Boxes that do not count sink to the end of the NMS, where they suppress no other.
    if cfg.nms.get("class_agnostic", False):
        apart = boxes
    else:
        apart = boxes + (groups.to(boxes.dtype) * (boxes.max() + 1))[:, None]
    kept = torchvision.ops.nms(apart, scores, cfg.nms.iou_threshold)
    survives = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, kept, True)
    scores = torch.where(survives, scores, 0)
    count = min(cfg.max_per_img, len(scores))
    scores, index = scores.topk(count)
    return boxes[index], scores, labels[index]


def _pool(extractor: Any, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """RoIAlign of each box ``[R, 4]`` on the level of its size, ``[R, C, h, w]``."""
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    layers = extractor.roi_layers
    levels = extractor.map_roi_levels(rois, len(layers))
    height, width = layers[0].output_size
    pooled = torch.zeros(len(boxes), extractor.out_channels, height, width)
    for level, (layer, feature) in enumerate(zip(layers, features, strict=False)):
        (rows,) = torch.where(levels == level)
        aligned = torchvision.ops.roi_align(
            feature, rois[rows], layer.output_size, layer.spatial_scale, layer.sampling_ratio,
            layer.aligned,
        )  # fmt: skip
        pooled = pooled.index_put((rows,), aligned)
    return pooled


def _check_kind(network: Network) -> None:
    """Raise ValueError for a detector that :class:`DetectorGraph` does not support."""
    from mmdet.models.dense_heads import RetinaHead, RPNHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads import StandardRoIHead
    from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead, Shared4Conv1FCBBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
    from mmdet.models.task_modules.prior_generators import AnchorGenerator

    model = network.model
    roi_head = getattr(model, "roi_head", None)
    dense: Any = getattr(model, "rpn_head", None) or getattr(model, "bbox_head", None)
    parts: list[tuple[str, Any, tuple[type, ...]]] = [
        ("rpn_head" if roi_head else "bbox_head", dense, (RPNHead if roi_head else RetinaHead,)),
        ("prior_generator", getattr(dense, "prior_generator", None), (AnchorGenerator,)),
        ("bbox_coder", getattr(dense, "bbox_coder", None), (DeltaXYWHBBoxCoder,)),
    ]
    if roi_head is not None:
        parts.append(("roi_head", roi_head, (StandardRoIHead,)))
        for name, kinds in (
            ("bbox_head", (Shared2FCBBoxHead, Shared4Conv1FCBBoxHead)),
            ("mask_head", (FCNMaskHead, type(None))),
            ("bbox_roi_extractor", (SingleRoIExtractor,)),
            ("mask_roi_extractor", (SingleRoIExtractor, type(None))),
        ):
            parts.append((f"roi_head.{name}", getattr(roi_head, name, None), kinds))
        bbox_coder = getattr(getattr(roi_head, "bbox_head", None), "bbox_coder", None)
        parts.append(("roi_head.bbox_head.bbox_coder", bbox_coder, (DeltaXYWHBBoxCoder,)))
    problem = next(
        (f"{name} is of {type(part).__name__}" for name, part, kinds in parts
         if type(part) not in kinds), "",
    )  # fmt: skip
    if not problem:
        heads = [dense] if roi_head is None else [dense, roi_head]
        nms = [head.test_cfg.get("nms", {}) for head in heads]
        if any(cfg.get("type", "nms") != "nms" for cfg in nms):
            problem = f"its NMS is {', '.join(str(cfg.get('type')) for cfg in nms)}"
        elif roi_head is None and type(dense).predict_by_feat is not BaseDenseHead.predict_by_feat:
            problem = f"{type(dense).__name__} decodes in its own way"
    if problem:
        raise ValueError(
            f"{type(model).__name__} of {network.name} has no graph with boxes here: {problem}; "
            "RetinaNet, Faster and Mask R-CNN have one. Export its backbone (--part backbone) or, "
            "of a single-stage detector, the maps of its head (--part model)"
        )


def export_detector(graph: DetectorGraph, path: str | Path, size: tuple[int, int]) -> Path:
    """Write a detector as ONNX for one image of ``size``, H and W.

    Raises:
        ModuleNotFoundError, ValueError: As :func:`mmrla.engine.export.export_onnx`.
    """
    shape = dict(image_shape=torch.tensor(size))
    return export_onnx(graph, path, size, dynamic=False, others=shape)


def fit_image(network: Network, path: str | Path, size: tuple[int, int]) -> dict[str, Any]:
    """Prepare an image file as input of a :class:`DetectorGraph`.

    The image is resized to fit, keeping its aspect ratio, and zero-padded on the right and below.

    Returns:
        ``images`` ``[1, 3, H, W]``; ``image_shape`` ``[2]``, H and W without the zeros;
        ``ori_shape``, H and W of the file; ``scale_factor``, by which x and y were multiplied.
    """
    image = read_image(path)
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    resized = mmcv.imresize(image, (int(width * scale + 0.5), int(height * scale + 0.5)))
    inputs = preprocess(network.model, [torch.from_numpy(resized.transpose(2, 0, 1).copy())])
    shape = resized.shape[:2]
    images = inputs.new_zeros(1, 3, *size)
    images[..., : shape[0], : shape[1]] = inputs[..., : shape[0], : shape[1]]
    return dict(
        images=images,
        image_shape=torch.tensor(shape),
        ori_shape=(height, width),
        scale_factor=(shape[1] / width, shape[0] / height),
    )


@torch.no_grad()
def detection_errors(
    path: str | Path, network: Network, size: tuple[int, int], images: Sequence[str | Path]
) -> list[dict[str, float]]:
    """Differences between detections of onnxruntime and of mmdet in the same padded images.

    Boxes of the graph are matched to mmdet's of the same label, by the distance of their corners
    and scores.

    Returns:
        For each image: ``count``, the number of mmdet's boxes; ``unmatched``, boxes of either side
        without a counterpart; ``box`` and ``score``, the largest differences of matched boxes, in
        pixels of the file and in scores; ``mask``, for Mask R-CNN, the largest share of an image's
        pixels that differ.
    """
    from mmdet.structures import DetDataSample

    session = session_of(path)
    found = []
    for file in images:
        one = fit_image(network, file, size)
        meta = dict(img_shape=tuple(one["image_shape"].tolist()), ori_shape=one["ori_shape"],
                    scale_factor=one["scale_factor"], batch_input_shape=size)  # fmt: skip
        with DefaultScope.overwrite_default_scope("mmdet"):
            (sample,) = network.model.predict(one["images"], [DetDataSample(metainfo=meta)])
        outputs = session.run(None, {name: one[name].numpy() for name in ("images", "image_shape")})
        found.append(_compare(sample.pred_instances, outputs, one))
    return found


def boxes_in_file(outputs: Sequence[np.ndarray], one: dict[str, Any]) -> list[Tensor]:
    """A graph's valid rows for a result of :func:`fit_image`, with boxes in the file's pixels."""
    counts = outputs[1] > 0
    boxes, *others = (torch.from_numpy(output[counts]) for output in outputs)
    return [boxes / boxes.new_tensor(one["scale_factor"]).repeat(2), *others]


def _compare(wanted: Any, outputs: Sequence[np.ndarray], one: dict[str, Any]) -> dict[str, float]:
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    boxes, scores, labels, *masks = boxes_in_file(outputs, one)
    free = torch.ones(len(boxes), dtype=torch.bool)
    errors = dict(count=len(wanted), unmatched=0, box=0.0, score=0.0)
    for index, (box, score, label) in enumerate(
        zip(wanted.bboxes, wanted.scores, wanted.labels, strict=True)
    ):
        rows = torch.nonzero(free & (labels == label) & ((scores - score).abs() < 0.01))[:, 0]
        if not len(rows):
            errors["unmatched"] += 1
            continue
        distances = (boxes[rows] - box).abs().amax(1)
        row = rows[distances.argmin()]
        free[row] = False
        errors["box"] = max(errors["box"], distances.min().item())
        errors["score"] = max(errors["score"], (scores[row] - score).abs().item())
        if masks:
            grid = masks[0][row][None, None]
            pasted, _ = _do_paste_mask(grid, boxes[row][None], *one["ori_shape"], skip_empty=False)
            differ = (pasted[0] >= 0.5) != wanted.masks[index]
            errors["mask"] = max(errors.get("mask", 0.0), differ.float().mean().item())
    errors["unmatched"] += int(free.sum())
    return errors
