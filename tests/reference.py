"""Layer attentions and the blocks around them from their equations, without mmrla's modules.

Networks are dicts of parameters by the package's state-dict names; norms use the batch.
"""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def batch_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """Along all but the channels."""
    dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    centred = x - x.mean(dims, keepdim=True)
    normed = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
    return normed * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


# Queries, keys, values and what is made of them -------------------------------------------------


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """A Conv1D or a fully connected layer on means over pixels, one output or tap at a time."""
    means = x.sum((2, 3)) / x[0, 0].numel() if x.dim() == 4 else x
    if weight.dim() == 2:
        return torch.stack([(means * row).sum(1) for row in weight], 1)
    framed, taps = F.pad(means, [weight.numel() // 2] * 2), range(weight.numel())
    return sum(weight[0, 0, i] * framed[:, i : i + means.shape[1]] for i in taps)


def convolved(x: Tensor, weight: Tensor | None) -> Tensor:
    """Depthwise, one tap at a time."""
    if weight is None:
        return x
    framed, (h, w) = F.pad(x, [1] * 4), x.shape[2:]
    return sum(
        weight[:, 0, i, j][:, None, None] * framed[:, :, i : i + h, j : j + w]
        for i in range(3)
        for j in range(3)
    )


def heads(v: Tensor, d: int) -> Tensor:
    return v.reshape(len(v), -1, d)


def spread(v: Tensor, d: int) -> Tensor:
    """A number per head over its channels and pixels."""
    return v.repeat_interleave(d, 1)[:, :, None, None]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def gated(query: Tensor, key: Tensor, value: Tensor, d: int) -> Tensor:
    """``sigmoid(<q, k>_head / sqrt(d_k)) * V`` of Eq. 7 and 10."""
    return spread(sigmoid((heads(query, d) * heads(key, d)).sum(2) / sqrt(d)), d) * value


def phi(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def softmax_kernel(q: Tensor, k: Tensor) -> Tensor:
    return torch.exp((q * k).sum(2) / sqrt(q.shape[2]))


def linear_kernel(q: Tensor, k: Tensor) -> Tensor:
    return (phi(q) * phi(k)).sum(2)


def shares(query: Tensor, keys: list[Tensor], d: int, kernel=softmax_kernel) -> list[Tensor]:
    """The weights of the layers, ``[B, heads]`` each."""
    found = [kernel(heads(query, d), heads(key, d)) for key in keys]
    return [share / sum(found) for share in found]


def retrieved(query: Tensor, keys: list, values: list, d: int, kernel=softmax_kernel) -> Tensor:
    """``sum_s share_s * V_s`` (Eq. 3, 6, 9, and that of A.3 with the linear kernel)."""
    weights = shares(query, keys, d, kernel)
    return sum(spread(weight, d) * v for weight, v in zip(weights, values, strict=True))


# Layers at a name, with state ------------------------------------------------------------------


def query_and_key(x: Tensor, w: Weights, name: str) -> tuple[Tensor, Tensor]:
    return projected(x, w[f"{name}.query.weight"]), projected(x, w[f"{name}.key.weight"])


def light(x: Tensor, previous: Tensor, w: Weights, name: str, d: int, act=lambda v: v) -> Tensor:
    """Eq. 10; the released layers take their shortcut for the previous output."""
    value = act(convolved(x, w[f"{name}.value.weight"]))
    scale = w[f"{name}.lambda_t"][:, None, None]
    return scale * previous + gated(*query_and_key(x, w, name), value, d)


def base(x: Tensor, state: tuple, w: Weights, name: str, d: int) -> tuple[Tensor, tuple]:
    """Eq. 9; the state has a key and a value per layer."""
    query, key = query_and_key(x, w, name)
    state = (*state, (key, convolved(x, w[f"{name}.value.weight"])))
    return retrieved(query, *zip(*state, strict=True), d), state


def on_map(x: Tensor, shortcut: Tensor, state: tuple, w: Weights, name: str, d: int, norm, kind):
    """``x + norm(o)`` behind a convolutional layer."""
    if kind == "MRLALight":
        o = light(x, shortcut, w, f"{name}.attention", d)
    else:
        o, state = base(x, state, w, f"{name}.attention", d)
    return x + norm(o), state


def on_tokens(x: Tensor, shortcut: Tensor, state: tuple, w: Weights, name: str, d: int, grid, kind):
    """Algorithms 2 and 4 for ``[B, extra + H*W, C]``: extra tokens pass by."""
    extra = x.shape[1] - grid[0] * grid[1]
    xn = layer_norm(x, w, f"{name}.norm")

    def as_map(tokens: Tensor) -> Tensor:
        return tokens[:, extra:].reshape(len(x), *grid, -1).permute(0, 3, 1, 2)

    if kind == "MRLALight":
        sn = layer_norm(shortcut, w, f"{name}.shortcut_norm")
        o = light(as_map(xn), as_map(sn), w, f"{name}.attention", d, act=F.gelu)
    else:
        o, state = base(as_map(xn), state, w, f"{name}.attention", d)
    o = o.permute(0, 2, 3, 1).reshape(len(x), grid[0] * grid[1], -1)
    return x + torch.cat([xn[:, :extra], o], 1), state


# Transformers ----------------------------------------------------------------------------------


def self_attention(x: Tensor, w: Weights, name: str, count: int) -> Tensor:
    batch, tokens, width = x.shape
    q, k, v = (x @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]).chunk(3, -1)
    split = [part.reshape(batch, tokens, count, -1).transpose(1, 2) for part in (q, k, v)]
    weights = (split[0] @ split[1].transpose(2, 3) / sqrt(width // count)).softmax(-1)
    joined = (weights @ split[2]).transpose(1, 2).reshape(batch, tokens, width)
    return joined @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    hidden = F.gelu(x @ w[f"{name}.0.0.weight"].T + w[f"{name}.0.0.bias"])
    return hidden @ w[f"{name}.1.weight"].T + w[f"{name}.1.bias"]


def ceit(x: Tensor, w: Weights, layers: int, count: int, patch: int, kind: str | None, d: int):
    """Class token of CeiT's layer-wise attention, after the final norm."""
    x = F.conv2d(x, w["stem.conv.weight"], stride=2, padding=3)
    x = F.max_pool2d(batch_norm(x, w, "stem.bn"), 3, stride=2, padding=1)
    projection = w["patch_embed.projection.weight"]
    x = F.conv2d(x, projection, w["patch_embed.projection.bias"], stride=patch)
    grid = tuple(x.shape[2:])
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + w["pos_embed"]
    class_tokens, state = [], ()
    for i in range(layers):
        name, shortcut = f"layers.{i}", x
        x = x + self_attention(layer_norm(x, w, f"{name}.ln1"), w, f"{name}.attn", count)
        normed = layer_norm(x, w, f"{name}.ln2")
        m = normed[:, 1:].reshape(len(x), *grid, -1).permute(0, 3, 1, 2)
        for j in (1, 2, 3):
            weight, bias = w[f"{name}.ffn.conv{j}.weight"], w[f"{name}.ffn.conv{j}.bias"]
            groups = weight.shape[0] if j == 2 else 1
            m = F.conv2d(m, weight, bias, padding=weight.shape[-1] // 2, groups=groups)
            m = batch_norm(m, w, f"{name}.ffn.bn{j}")
            m = F.gelu(m) if j < 3 else m
        patches = m.permute(0, 2, 3, 1).reshape(len(x), grid[0] * grid[1], -1)
        x = x + torch.cat([normed[:, :1], patches], 1)
        if kind is not None:
            state = () if i % 4 == 0 else state
            x, state = on_tokens(x, shortcut, state, w, f"{name}.mrla", d, grid, kind)
        class_tokens.append(x[:, :1])
    x = torch.cat(class_tokens, 1) + w["lca.pos_embed"]
    x = (x + self_attention(layer_norm(x, w, "lca.ln1"), w, "lca.attn", count))[:, -1:]
    x = x + mlp(layer_norm(x, w, "lca.ln2"), w, "lca.ffn.layers")
    return layer_norm(x, w, "ln1")[:, 0]


def stream_vit(x: Tensor, w: Weights, depth: int, count: int, patch: int, size: int | None):
    """A ViT with AttnRes (blocks of ``size``) or DenseFormer (None) along its residual stream.

    Returns all tokens behind the last norm, and the weights of each attention over sources.
    """
    kernel = w["patch_embed.projection.weight"]
    x = F.conv2d(x, kernel, w["patch_embed.projection.bias"], stride=patch)
    extra = [w[n].expand(len(x), 1, -1) for n in ("cls_token", "dist_token") if n in w]
    x = torch.cat([*extra, x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    outputs, scores = [x], []

    def sublayer(x: Tensor, i: int, part: str) -> Tensor:
        normed = layer_norm(x, w, f"layers.{i}.ln{1 if part == 'attn' else 2}")
        if part == "attn":
            return self_attention(normed, w, f"layers.{i}.attn", count)
        return mlp(normed, w, f"layers.{i}.ffn.layers")

    for i in range(depth):
        if size is None:
            x = x + sublayer(x, i, "attn")
            outputs.append(x + sublayer(x, i, "ffn"))
            scores.append(w[f"layers.{i}.mrla.alpha"])
            x = torch.einsum("s,sbnc->bnc", scores[-1], torch.stack(outputs))
            continue
        for part in ("attn", "ffn"):
            outputs.append(sublayer(x, i, part))
            spans = pairwise([*range(1, len(outputs), size), len(outputs)])
            sources = torch.stack([outputs[0], *(sum(outputs[a:b]) for a, b in spans)])
            keys = sources / (sources.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            logits = torch.einsum("c,sbnc->bns", w[f"layers.{i}.mrla.{part}.query"], keys)
            scores.append(logits.softmax(-1))
            x = torch.einsum("bns,sbnc->bnc", scores[-1], sources)
    return layer_norm(x, w, "ln1"), scores


# Stages of basic blocks ------------------------------------------------------------------------


def branch_and_shortcut(x: Tensor, w: Weights, name: str, stride: int, hidden=None):
    """The residual branch behind its last norm, and the identity branch."""
    weight, seen = w[f"{name}.conv1.weight"], x
    if hidden is not None:  # RLA_g to the letter: one convolution of the concatenation
        weight = torch.cat([weight, w[f"{name}.mrla.read.weight"]], dim=1)
        seen = torch.cat([x, hidden], dim=1)
    z = F.conv2d(seen, weight, stride=stride, padding=1)
    z = F.conv2d(F.relu(batch_norm(z, w, f"{name}.bn1")), w[f"{name}.conv2.weight"], padding=1)
    shortcut = x
    if f"{name}.downsample.0.weight" in w:
        shortcut = F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride)
        shortcut = batch_norm(shortcut, w, f"{name}.downsample.1")
    return batch_norm(z, w, f"{name}.bn2"), shortcut


def cell(y: Tensor, state: tuple[Tensor, Tensor] | None, w: Weights) -> tuple[Tensor, Tensor]:
    """DIA-LSTM with four gates, dynamic sharing unit with three: h and c of the stage's cell."""

    def gates(y: Tensor, name: str) -> Tensor:
        name = f"0.mrla.cell.{name}"
        hidden = F.relu(y @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"])
        return hidden @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]

    h, c = state or (torch.zeros_like(y), torch.zeros_like(y))
    parts = torch.split(gates(y, "from_input") + gates(h, "from_hidden"), y.shape[1], dim=1)
    c = sigmoid(parts[1]) * c + sigmoid(parts[0]) * torch.tanh(parts[2])
    return (sigmoid(parts[3]) * sigmoid(c) if len(parts) == 4 else sigmoid(c)), c


def dia_stage(x: Tensor, w: Weights, blocks: int, stride: int) -> Tensor:
    state = None
    for t in range(blocks):
        branch, shortcut = branch_and_shortcut(x, w, str(t), stride if t == 0 else 1)
        state = cell(branch.mean((2, 3)), state, w)
        x = F.relu(branch * state[0][:, :, None, None] + shortcut)
    return x


def pooled(h: Tensor) -> Tensor:
    """Means of 2 x 2, of what there is at an odd edge."""
    rows, columns = (range(0, size, 2) for size in h.shape[2:])
    means = [[h[:, :, i : i + 2, j : j + 2].mean((2, 3)) for j in columns] for i in rows]
    return torch.stack([torch.stack(row, -1) for row in means], -2)


def rla_stage(x: Tensor, h: Tensor, w: Weights, blocks: int, stride: int) -> tuple[Tensor, Tensor]:
    for t in range(blocks):
        step = stride if t == 0 else 1
        branch, shortcut = branch_and_shortcut(x, w, str(t), step, h)
        h = pooled(h) if step == 2 else h
        h = h + torch.einsum("bchw,kc->bkhw", branch, w["0.mrla.aggregate.weight"][:, :, 0, 0])
        h = torch.tanh(batch_norm(h, w, f"{t}.mrla.norm"))
        h = F.conv2d(h, w["0.mrla.recur.weight"], padding=1)
        x = F.relu(branch + shortcut)
    return x, h


def dla_stage(x: Tensor, w: Weights, blocks: int, stride: int, d: int, kind: str) -> Tensor:
    """DLALight renews the shortcut by the cell, DLABase all earlier keys and values."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    state = None
    for t in range(blocks):
        branch, shortcut = branch_and_shortcut(x, w, str(t), stride if t == 0 else 1)
        x = F.relu(branch + shortcut)
        y = x.mean((2, 3))
        state = cell(y, state, w)
        query, key = query_and_key(y, w, f"{t}.mrla")
        value = convolved(x, w[f"{t}.mrla.value.weight"])

        def scale(v: Tensor, state=state) -> Tensor:
            return cell(v, state, w)[0]

        if kind == "DLALight":
            fresh = shortcut * scale(shortcut.mean((2, 3)))[:, :, None, None]
            fresh = fresh + convolved(shortcut, w["0.mrla.refresh.weight"])
            o = gated(query, key, value, d) + w[f"{t}.mrla.lambda_t"][:, None, None] * fresh
            x = x + batch_norm(o, w, f"{t}.bn_mrla")
            continue
        keys = [*(k * scale(k) for k in keys), key]
        values = [*(v * scale(v.mean((2, 3)))[:, :, None, None] for v in values), value]
        o = retrieved(query, keys, values, d)
        x = x + F.relu(batch_norm(o, w, f"{t}.bn_mrla"))
    return x


def kcla_stage(x: Tensor, w: Weights, blocks: int, stride: int, d: int, carried=None):
    """u and z summed up as the paper writes them; norms behind the attention with a ReLU."""
    u, z = carried or (None, None)
    for t in range(blocks):
        branch, shortcut = branch_and_shortcut(x, w, str(t), stride if t == 0 else 1)
        x = F.relu(branch + shortcut)
        name, count = f"{t}.mrla", x.shape[1] // d
        # n_h, as float32 numbers
        steps = torch.tensor([0.7 ** (2 * h / max(count - 1, 1) - 1) for h in range(count)])

        def weight_of(key: Tensor, steps: Tensor = steps) -> Tensor:
            lengths = heads(key, d).square().sum(2).sqrt()
            return spread(torch.exp(torch.clamp(lengths / steps.double(), max=10)), d)

        if u is not None and t == 0:
            taps = w[f"{name}.crossing.0.weight"]
            old = F.conv2d(u / z, taps, stride=stride, groups=u.shape[1] // taps.shape[1])
            old = batch_norm(old, w, f"{name}.crossing.1")
            z = weight_of(projected(old, w[f"{name}.crossing_key.weight"]))
            u = old * z
        query, key = query_and_key(x, w, name)
        e = weight_of(key)
        u, z = (e * x, e) if u is None else (u + e * x, z + e)
        query, key = heads(query, d), heads(key, d)
        along = (query * key).sum(2) / key.square().sum(2).sqrt()
        gate = spread(sigmoid(along @ w[f"{name}.gate.weight"].T), d)
        o = gate * convolved(u / (z + 1e-3), w[f"{name}.value.weight"])
        x = x + F.relu(batch_norm(o, w, f"{t}.bn_mrla"))
    return x, (u, z)
