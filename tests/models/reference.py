"""Layer attentions and CeiT written out from their equations, without mmrla's modules."""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def _query_and_key(x: Tensor, w: Weights, name: str) -> tuple[Tensor, Tensor]:
    summary = x.mean((2, 3))
    found = []
    for part in ("query", "key"):
        kernel = w[f"{name}.{part}.weight"].flatten()
        padded = F.pad(summary, [len(kernel) // 2] * 2)
        found.append(padded.unfold(1, len(kernel), 1) @ kernel)
    return found[0], found[1]


def _heads(x: Tensor, d: int) -> Tensor:
    return x.reshape(len(x), -1, d)


def _value(x: Tensor, w: Weights, name: str) -> Tensor:
    kernel = w[f"{name}.value.weight"]
    shifted = F.pad(x, [1] * 4).unfold(2, 3, 1).unfold(3, 3, 1)
    return torch.einsum("bchwij,cij->bchw", shifted, kernel[:, 0])


def light(x: Tensor, shortcut: Tensor, w: Weights, name: str, d: int, act=lambda v: v) -> Tensor:
    """Eq. 10 with the layer's shortcut for the previous output."""
    query, key = _query_and_key(x, w, name)
    gate = torch.sigmoid((_heads(query, d) * _heads(key, d)).sum(2) / sqrt(d))
    gate = gate.repeat_interleave(d, 1)[:, :, None, None]
    scale = w[f"{name}.lambda_t"][:, None, None]
    return scale * shortcut + gate * act(_value(x, w, name))


def base(x: Tensor, state: tuple, w: Weights, name: str, d: int) -> tuple[Tensor, tuple]:
    """Eq. 9: softmax over the layers of the group."""
    query, key = _query_and_key(x, w, name)
    state = (*state, (key, _value(x, w, name)))
    logits = [(_heads(query, d) * _heads(k, d)).sum(2) / sqrt(d) for k, _ in state]
    weights = torch.stack(logits).softmax(0).repeat_interleave(d, 2)[..., None, None]
    return (weights * torch.stack([v for _, v in state])).sum(0), state


def on_map(x: Tensor, shortcut: Tensor, state: tuple, w: Weights, name: str, d: int, norm, kind):
    """``x + norm(o)`` behind a convolutional layer."""
    if kind == "MRLALight":
        o = light(x, shortcut, w, f"{name}.attention", d)
    else:
        o, state = base(x, state, w, f"{name}.attention", d)
    return x + norm(o), state


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


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


def _self_attention(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    q, k, v = (x @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]).chunk(3, -1)
    split = [part.reshape(batch, tokens, heads, -1).transpose(1, 2) for part in (q, k, v)]
    weights = (split[0] @ split[1].transpose(2, 3) / sqrt(width // heads)).softmax(-1)
    joined = (weights @ split[2]).transpose(1, 2).reshape(batch, tokens, width)
    return joined @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]


def _batch_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    normed = (x - mean) / (var + 1e-5).sqrt()
    return normed * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def ceit(x: Tensor, w: Weights, layers: int, heads: int, patch: int, kind: str | None, d: int):
    """CeiT in training mode: class token of the layer-wise attention, after the final norm."""
    x = F.conv2d(x, w["stem.conv.weight"], stride=2, padding=3)
    x = F.max_pool2d(_batch_norm(x, w, "stem.bn"), 3, stride=2, padding=1)
    projection = w["patch_embed.projection.weight"]
    x = F.conv2d(x, projection, w["patch_embed.projection.bias"], stride=patch)
    grid = tuple(x.shape[2:])
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + w["pos_embed"]
    class_tokens, state = [], ()
    for i in range(layers):
        name, shortcut = f"layers.{i}", x
        x = x + _self_attention(layer_norm(x, w, f"{name}.ln1"), w, f"{name}.attn", heads)
        normed = layer_norm(x, w, f"{name}.ln2")
        m = normed[:, 1:].reshape(len(x), *grid, -1).permute(0, 3, 1, 2)
        for j in (1, 2, 3):
            weight, bias = w[f"{name}.ffn.conv{j}.weight"], w[f"{name}.ffn.conv{j}.bias"]
            groups = weight.shape[0] if j == 2 else 1
            m = F.conv2d(m, weight, bias, padding=weight.shape[-1] // 2, groups=groups)
            m = _batch_norm(m, w, f"{name}.ffn.bn{j}")
            m = F.gelu(m) if j < 3 else m
        patches = m.permute(0, 2, 3, 1).reshape(len(x), grid[0] * grid[1], -1)
        x = x + torch.cat([normed[:, :1], patches], 1)
        if kind is not None:
            state = () if i % 4 == 0 else state
            x, state = on_tokens(x, shortcut, state, w, f"{name}.mrla", d, grid, kind)
        class_tokens.append(x[:, :1])
    x = torch.cat(class_tokens, 1) + w["lca.pos_embed"]
    x = (x + _self_attention(layer_norm(x, w, "lca.ln1"), w, "lca.attn", heads))[:, -1:]
    hidden = layer_norm(x, w, "lca.ln2") @ w["lca.ffn.layers.0.0.weight"].T
    hidden = F.gelu(hidden + w["lca.ffn.layers.0.0.bias"])
    x = x + hidden @ w["lca.ffn.layers.1.weight"].T + w["lca.ffn.layers.1.bias"]
    return layer_norm(x, w, "ln1")[:, 0]
