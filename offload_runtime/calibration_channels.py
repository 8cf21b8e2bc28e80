"""Label channels from the JSON files that the Double Sparsity repository publishes (its config/*.json).

An object of lists: "model.layers.3.self_attn.qk_proj" -> for each head all
channels, the most important first. qk_proj has a list a query head and counts
|q k| after RoPE, q_proj a list a query head, k_proj one a KV head, both before RoPE.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

SUFFIX = {"channels": "qk_proj", "channels-q": "q_proj", "channels-k": "k_proj"}  # by calibration method
KEY = re.compile(r"layers\.(\d+)\.self_attn\.(qk_proj|q_proj|k_proj)$")


def published_maps(
    file: Path, method: str, channels: int, facts: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query_map [L, Hq, R, D], key_map [L, Hkv, R, D], key_mean [L, Hkv, D] of a published file.

    facts: config_facts of the model that it must fit. A KV head that several query
    heads share has one set of channels: those with the best mean rank in their lists.
    """
    if method not in SUFFIX:
        raise UserError(f"--channels-from goes with --method {', '.join(SUFFIX)}; {method!r} needs a text")
    layers, heads, kv_heads, dim = (
        facts[name]
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    orders = read_orders(file, SUFFIX[method])
    if sorted(orders) != list(range(layers)):
        raise UserError(
            f"{file} has {SUFFIX[method]} of {len(orders)} layers, this model has {layers} layers"
        )
    wanted = kv_heads if method == "channels-k" else heads
    maps = [layer_map(file, orders[i], wanted, kv_heads, dim, channels) for i in range(layers)]
    key_map = torch.stack(maps)  # [L, Hkv, R, D]
    mean = torch.zeros(layers, kv_heads, dim)
    return key_map.repeat_interleave(heads // kv_heads, 1), key_map, mean


def layer_map(file: Path, order: Any, heads: int, kv_heads: int, dim: int, channels: int) -> torch.Tensor:
    """Rows of the identity [Hkv, R, D] from one layer's lists [heads][D]."""
    try:
        ranked = torch.tensor(order, dtype=torch.long)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is no channel file: a layer is not a list of lists of numbers") from error
    everything = torch.arange(dim).expand(heads, dim)
    if ranked.shape != (heads, dim) or not torch.equal(ranked.sort(-1).values, everything):
        raise UserError(
            f"{file} has lists of shape {tuple(ranked.shape)}, "
            f"this model needs {heads} orders of {dim} channels"
        )
    rank = ranked.argsort(-1).view(kv_heads, -1, dim).double().mean(1)  # [Hkv, D], 0 is the best
    chosen = torch.argsort(rank, dim=-1, stable=True)[:, :channels].sort(-1).values  # [Hkv, R]
    return torch.nn.functional.one_hot(chosen, dim).float()


def read_orders(file: Path, suffix: str) -> dict[int, Any]:
    """The lists of every layer that has such a key; UserError when the file is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{file} is not JSON; give a channel file as Double Sparsity publishes them"
        ) from error
    found = {}
    for key, lists in content.items() if isinstance(content, dict) else ():
        match = KEY.search(key)
        if match and match[2] == suffix:
            found[int(match[1])] = lists
    if not found:
        raise UserError(f"{file} has no key like model.layers.0.self_attn.{suffix}; is it a channel file?")
    return found
