"""DIANet, RLA_g and DLA in basic blocks, written down anew from their equations.

A stage is a dict of parameters by the package's state-dict names; nothing of the package is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


def batch_norm(x: Tensor, p: Params, name: str) -> Tensor:
    """Training mode: statistics of the batch."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    weight, bias = (p[f"{name}.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def branch_and_shortcut(x: Tensor, p: Params, name: str, stride: int, hidden=None):
    """The residual branch of a basic block behind its last norm, and its identity branch."""
    weight, seen = p[f"{name}.conv1.weight"], x
    if hidden is not None:
        # RLA_g to the letter: one convolution of the concatenation.
        weight = torch.cat([weight, p[f"{name}.mrla.read.weight"]], dim=1)
        seen = torch.cat([x, hidden], dim=1)
    z = F.conv2d(seen, weight, stride=stride, padding=1)
    z = F.conv2d(F.relu(batch_norm(z, p, f"{name}.bn1")), p[f"{name}.conv2.weight"], padding=1)
    shortcut = x
    if f"{name}.downsample.0.weight" in p:
        shortcut = F.conv2d(x, p[f"{name}.downsample.0.weight"], stride=stride)
        shortcut = batch_norm(shortcut, p, f"{name}.downsample.1")
    return batch_norm(z, p, f"{name}.bn2"), shortcut


def gates(y: Tensor, p: Params, name: str) -> Tensor:
    hidden = F.relu(y @ p[f"{name}.0.weight"].T + p[f"{name}.0.bias"])
    return hidden @ p[f"{name}.2.weight"].T + p[f"{name}.2.bias"]


def cell(y: Tensor, h: Tensor, c: Tensor, p: Params, name: str) -> tuple[Tensor, Tensor]:
    """DIA-LSTM with four gates, dynamic sharing unit with three."""
    total = gates(y, p, f"{name}.from_input") + gates(h, p, f"{name}.from_hidden")
    parts = torch.split(total, y.shape[1], dim=1)
    i, f, g = torch.sigmoid(parts[0]), torch.sigmoid(parts[1]), torch.tanh(parts[2])
    c = f * c + i * g
    h = torch.sigmoid(c)
    return (torch.sigmoid(parts[3]) * h if len(parts) == 4 else h), c


def dia_stage(x: Tensor, p: Params, blocks: int, stride: int) -> Tensor:
    h = c = None
    for t in range(blocks):
        branch, shortcut = branch_and_shortcut(x, p, str(t), stride if t == 0 else 1)
        y = branch.mean((2, 3))
        h, c = (torch.zeros_like(y), torch.zeros_like(y)) if t == 0 else (h, c)
        h, c = cell(y, h, c, p, "0.mrla.cell")
        x = F.relu(branch * h[:, :, None, None] + shortcut)
    return x


def rla_stage(x: Tensor, h: Tensor, p: Params, blocks: int, stride: int) -> tuple[Tensor, Tensor]:
    for t in range(blocks):
        step = stride if t == 0 else 1
        branch, shortcut = branch_and_shortcut(x, p, str(t), step, h)
        if step == 2:
            h = pool(h)
        h = h + torch.einsum("bchw,kc->bkhw", branch, p["0.mrla.aggregate.weight"][:, :, 0, 0])
        h = torch.tanh(batch_norm(h, p, f"{t}.mrla.norm"))
        h = F.conv2d(h, p["0.mrla.recur.weight"], padding=1)
        x = F.relu(branch + shortcut)
    return x, h


def pool(h: Tensor) -> Tensor:
    """Means of 2 x 2, of what there is at an odd edge."""
    height, width = h.shape[2:]
    rows = [
        torch.stack(
            [h[:, :, i : i + 2, j : j + 2].mean((2, 3)) for j in range(0, width, 2)], dim=-1
        )
        for i in range(0, height, 2)
    ]
    return torch.stack(rows, dim=-2)


def attention_weights(y: Tensor, p: Params, name: str) -> tuple[Tensor, Tensor]:
    """Query and key of a summary ``[B, C]``."""
    found = []
    for kind in ("query", "key"):
        weight = p[f"{name}.{kind}.weight"]
        found.append(F.conv1d(y[:, None], weight, padding=weight.shape[2] // 2)[:, 0])
    return found[0], found[1]


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1, groups=x.shape[1])


def heads(v: Tensor, d: int) -> Tensor:
    return v.view(v.shape[0], -1, d)


def dla_light_stage(x: Tensor, p: Params, blocks: int, stride: int, d: int) -> Tensor:
    h = c = None
    for t in range(blocks):
        branch, shortcut = branch_and_shortcut(x, p, str(t), stride if t == 0 else 1)
        x = F.relu(branch + shortcut)
        y = x.mean((2, 3))
        h, c = (torch.zeros_like(y), torch.zeros_like(y)) if t == 0 else (h, c)
        h, c = cell(y, h, c, p, "0.mrla.cell")
        scale, _ = cell(shortcut.mean((2, 3)), h, c, p, "0.mrla.cell")
        fresh = shortcut * scale[:, :, None, None]
        fresh = fresh + depthwise(shortcut, p["0.mrla.refresh.weight"])
        query, key = attention_weights(y, p, f"{t}.mrla")
        gate = torch.sigmoid((heads(query, d) * heads(key, d)).sum(2) / d**0.5)
        gate = gate[:, :, None].expand(-1, -1, d).reshape(y.shape)[:, :, None, None]
        o = gate * depthwise(x, p[f"{t}.mrla.value.weight"])
        o = o + p[f"{t}.mrla.lambda_t"][:, None, None] * fresh
        x = x + batch_norm(o, p, f"{t}.bn_mrla")
    return x


def dla_base_stage(x: Tensor, p: Params, blocks: int, stride: int, d: int) -> Tensor:
    keys: list[Tensor] = []
    values: list[Tensor] = []
    h = c = None
    for t in range(blocks):
        branch, shortcut = branch_and_shortcut(x, p, str(t), stride if t == 0 else 1)
        x = F.relu(branch + shortcut)
        y = x.mean((2, 3))
        h, c = (torch.zeros_like(y), torch.zeros_like(y)) if t == 0 else (h, c)
        h, c = cell(y, h, c, p, "0.mrla.cell")
        for s in range(t):
            keys[s] = keys[s] * cell(keys[s], h, c, p, "0.mrla.cell")[0]
            scale, _ = cell(values[s].mean((2, 3)), h, c, p, "0.mrla.cell")
            values[s] = values[s] * scale[:, :, None, None]
        query, key = attention_weights(y, p, f"{t}.mrla")
        keys.append(key)
        values.append(depthwise(x, p[f"{t}.mrla.value.weight"]))
        logits = torch.stack([(heads(query, d) * heads(k, d)).sum(2) for k in keys]) / d**0.5
        weights = torch.exp(logits) / torch.exp(logits).sum(0)
        o = torch.zeros_like(x)
        for weight, value in zip(weights, values, strict=True):
            weight = weight[:, :, None].expand(-1, -1, d).reshape(y.shape)
            o = o + weight[:, :, None, None] * value
        x = x + F.relu(batch_norm(o, p, f"{t}.bn_mrla"))
    return x
