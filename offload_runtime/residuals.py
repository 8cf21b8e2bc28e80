"""Residual additions of plain decoder layers, made by the product before them.

A plain layer is h = x + attention(norm(x)), then h + mlp(norm(h)), each half ending with
its projection. Whether one is, is found by a trial: its own forward and ours, without
any product of ours, on the same random input make the same bits, and what a half
returns is the very tensor that its projection returned. As launches of their own they
take 2 x 4 us a layer (Llama-3.1-8B shape, H100, profile of a decode step).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapter import AttentionCall, ModelAdapter
from .forwards import Replacement
from .products import OUTPUT, Joined

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def residual_forwards(
    adapter: ModelAdapter, singles: Mapping[nn.Linear, Joined], tokens: int
) -> list[Replacement]:
    """Forwards of the layers whose residuals can be added by products, which are in `singles`."""
    places = [place for place, layer in enumerate(adapter.layers) if has_parts(layer)]
    if not singles or not places:
        return []
    found: list[Replacement] = []
    with torch.no_grad(), adapter.handled_by([hand_on] * len(adapter.layers)):
        keywords = layer_keywords(adapter, tokens)
        hidden = random_hidden(adapter, tokens)
        for place in places:
            layer: Any = adapter.layers[place]
            lasts = [singles.get(last) for last in last_linears(layer)]  # type: ignore[arg-type]
            if any(lasts) and is_plain_layer(layer, hidden, keywords[place]):
                found.append((layer, plain_layer_forward(layer, *lasts)))
    return found


def has_parts(layer: Any) -> bool:
    return "forward" not in vars(layer) and all(hasattr(layer, name) for name in PARTS)


def last_linears(layer: Any) -> tuple[nn.Linear | None, nn.Linear | None]:
    """The projections that should end the layer's attention and its MLP."""
    outputs = (getattr(layer.self_attn, name, None) for name in OUTPUT)
    return next((output for output in outputs if output is not None), None), getattr(
        layer.mlp, "down_proj", None
    )


def plain_layer_forward(layer: Any, attention: Joined | None, mlp: Joined | None) -> Callable[..., Any]:
    """A plain layer's forward, its residuals handed to the products that end its two halves."""

    def forward(hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
        normed = layer.input_layernorm(hidden_states)
        hidden = added(attention, hidden_states, lambda: layer.self_attn(hidden_states=normed, **keywords)[0])
        normed_again = layer.post_attention_layernorm(hidden)
        return added(mlp, hidden, lambda: layer.mlp(normed_again))

    return forward


def added(last: Joined | None, residual: torch.Tensor, half: Callable[[], torch.Tensor]) -> torch.Tensor:
    """residual + half(); by half's last product, unless that is not ours or runs as torch's own this time."""
    if last is None:
        return residual + half()
    last.residual = residual
    try:
        out = half()
        return out if last.residual is None else residual + out
    finally:
        last.residual = None


def is_plain_layer(layer: Any, hidden: torch.Tensor, keywords: dict[str, Any]) -> bool:
    """Whether plain_layer_forward computes what the layer does, and its halves end as they should."""
    own = layer.forward(hidden, **keywords)
    ends: list[bool] = []
    attention, mlp = last_linears(layer)
    try:
        with watched(layer.self_attn, attention, ends), watched(layer.mlp, mlp, ends):
            ours = plain_layer_forward(layer, None, None)(hidden, **keywords)
    except TypeError:  # a half that wants or returns something else
        return False
    return isinstance(own, torch.Tensor) and torch.equal(ours, own) and ends == [True, True]


@contextmanager
def watched(half: nn.Module, last: nn.Module | None, ends: list[bool]) -> Iterator[None]:
    """Note in `ends` whether what a half returns is the tensor that its last projection returned."""
    made: list[Any] = []
    hooks = [] if last is None else [last.register_forward_hook(lambda _, __, out: made.append(out))]

    def compare(_: nn.Module, __: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        ends.append(last is None or (len(made) == 1 and made[0] is first))

    hooks.append(half.register_forward_hook(compare))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hand_on(call: AttentionCall) -> torch.Tensor:
    """An attention to the token itself alone: [B, 1, Hq, D]."""
    return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1).transpose(1, 2)


def layer_keywords(adapter: ModelAdapter, tokens: int) -> dict[int, dict[str, Any]]:
    """The keywords that every layer gets in a step of one token in each of `tokens` sequences."""
    seen: dict[int, dict[str, Any]] = {}

    def note(index: int, _: torch.Tensor, keywords: dict[str, Any]) -> None:
        seen[index] = keywords

    ids = torch.zeros(tokens, 1, dtype=torch.long, device=adapter.device)
    with adapter.observed_by(note):
        adapter.model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1)
    return seen


def random_hidden(adapter: ModelAdapter, tokens: int) -> torch.Tensor:
    """A random layer input [T, 1, E]."""
    width = adapter.model.config.get_text_config(decoder=True).hidden_size
    generator = torch.Generator(adapter.device).manual_seed(0)
    hidden = torch.randn(tokens, 1, width, generator=generator, device=adapter.device)
    return hidden.to(adapter.dtype)
