"""Where a model's decode step can make its matrix products in fewer launches, and the forwards that do.

- q, k and v of an attention module: the one that is called first makes all three.
- A gated MLP: act(gate(x)) * up(x) at once, then its down projection.
- The output projection.

Only plain linear layers take part: no hooks, no LoRA, no packed weights. The modules
keep their weights where they are; nothing is copied or changed but `forward`, for the
time of a step. Whether that is faster is found by a trial (product_trial.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .adapter import ModelAdapter, stop_at_query
from .agreement import agree
from .forwards import Replacement
from .kernels.gated import ACTIVATIONS, activate, gated
from .kernels.products import Tile, products, tiles
from .product_trial import Work, choose_tile

QKV = ("q_proj", "k_proj", "v_proj")
OUTPUT = ("o_proj", "dense")  # names that transformers' attention modules give it
GATED = ("gate_proj", "up_proj")

Site = tuple[Any, list[nn.Linear]]  # a module, and layers in it that one launch can make


class Joined:
    """Linear layers of one input, made by one launch when the first of them is called.

    first_only: says when only the called one is wanted; then nothing is kept, so that it
    may run on another stream.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        tokens: int,
        tile: Tile,
        first_only: Callable[[], bool] = lambda: False,
    ) -> None:
        self.linears, self.tokens, self.tile, self.first_only = linears, tokens, tile, first_only
        self.source: torch.Tensor | None = None  # the input of `outs`; held, so that no other can pass for it
        self.outs: dict[int, torch.Tensor] = {}  # by place in linears; those not called for yet
        self.residual: torch.Tensor | None = None  # what the next call of a single layer adds (residuals.py)

    def forwards(self) -> list[Replacement]:
        return [(linear, self._forward_of(place)) for place, linear in enumerate(self.linears)]

    def _forward_of(self, place: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: self.output(place, x)

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Layer `place`'s product with x [..., E]."""
        linear = self.linears[place]
        if token_count(x) != self.tokens:
            return functional.linear(x, linear.weight, linear.bias)
        if self.first_only():
            return joint_products([linear], x, self.tile)[0]
        if self.residual is not None:
            residual, self.residual = self.residual, None
            return products(x, [linear.weight], [linear.bias], residual, self.tile)[0]
        if self.source is not x or place not in self.outs:
            self.source, self.outs = x, dict(enumerate(joint_products(self.linears, x, self.tile)))
        out = self.outs.pop(place)
        if not self.outs:
            self.source = None
        return out


def token_count(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def is_plain_linear(module: Any) -> bool:
    """Whether calling the module is x times its weight plus its bias, and nothing else sees that call."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or "forward" in vars(module):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and module.weight.is_contiguous() and module.weight.is_floating_point()


def plain_linears(module: Any, names: Iterable[str]) -> list[nn.Linear]:
    """The module's layers of these names; [] unless all are plain and of one input width and type."""
    parts = [getattr(module, name, None) for name in names]
    if not all(is_plain_linear(part) for part in parts):
        return []
    kinds = {(part.in_features, part.weight.dtype, part.weight.device) for part in parts if part is not None}
    return parts if len(kinds) == 1 else []  # type: ignore[return-value]


def query_projections(attentions: Sequence[Any]) -> dict[int, nn.Linear]:
    """The plain query projections by layer, where attention modules have one of its own."""
    found = {index: query_projection(attention) for index, attention in enumerate(attentions)}
    return {index: linear for index, linear in found.items() if linear is not None}


def query_projection(attention: Any) -> nn.Linear | None:
    """An attention module's, None where it is not a plain linear layer of its own."""
    return next(iter(plain_linears(attention, QKV[:1])), None)


def joint_products(linears: Sequence[nn.Linear], x: torch.Tensor, tile: Tile | None) -> list[torch.Tensor]:
    """The layers' products with x in one launch; without a tile torch's own, one by one."""
    if tile is None:
        return [functional.linear(x, part.weight, part.bias) for part in linears]
    return products(x, [part.weight for part in linears], [part.bias for part in linears], tile=tile)


def gated_work(activation: str) -> Work:
    """What product_trial.Work is for a gate and an up projection."""

    def work(linears: Sequence[nn.Linear], x: torch.Tensor, tile: Tile | None) -> list[torch.Tensor]:
        gate, up = linears
        if tile is None:
            opened, through = joint_products(linears, x, None)
            return [activate(opened, activation) * through]
        return [gated(x, gate.weight, up.weight, gate.bias, up.bias, activation, tile)]

    return work


def activation_of(mlp: Any) -> str | None:
    """Which of the known activations the module's is; None if it is another."""
    act = getattr(mlp, "act_fn", None)
    if not callable(act):
        return None
    trial = torch.linspace(-6, 6, 256, device=mlp.gate_proj.weight.device, dtype=mlp.gate_proj.weight.dtype)
    return next((kind for kind in ACTIVATIONS if agree(activate(trial, kind), act(trial))), None)


def gated_forward(
    mlp: Any, activation: str, tokens: int, tile: Tile
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gated MLP's forward with its first half in one launch."""
    plain, work, linears = mlp.forward, gated_work(activation), [mlp.gate_proj, mlp.up_proj]

    def forward(x: torch.Tensor) -> torch.Tensor:
        if token_count(x) != tokens:
            return plain(x)
        return mlp.down_proj(work(linears, x, tile)[0])

    return forward


def computes_the_same(mlp: Any, forward: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> bool:
    """Whether that is what the module computes (some clip, scale or thin out what is between)."""
    weight = mlp.gate_proj.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(tokens, 1, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    with torch.no_grad():
        theirs = mlp(x)
        return isinstance(theirs, torch.Tensor) and agree(forward(x), theirs)


def product_forwards(adapter: ModelAdapter, tokens: int) -> tuple[list[Replacement], dict[nn.Linear, Joined]]:
    """Forwards for a step of `tokens` tokens, where they are faster than the modules' own.

    Also returns those last layers of attention modules and MLPs that can add a residual.
    """
    if not tiles(tokens):
        return [], {}
    mlps = gated_modules(adapter)
    found = gated_forwards(mlps, tokens)
    queries = [(attention, plain_linears(attention, QKV)) for attention in adapter.attentions]
    for sites, tile in tiled("q, k, v", joint_products, queries, tokens):
        for attention, linears in sites:
            found += Joined(linears, tokens, tile, query_only(attention)).forwards()
    lasts = [
        (attention, plain_linears(attention, (name,))) for attention in adapter.attentions for name in OUTPUT
    ]
    lasts += [(mlp, plain_linears(mlp, ("down_proj",))) for mlp, _ in mlps]
    singles: dict[nn.Linear, Joined] = {}
    for sites, tile in tiled("product", joint_products, lasts, tokens):
        singles |= {linears[0]: Joined(linears, tokens, tile) for _, linears in sites}
    return found + [pair for single in singles.values() for pair in single.forwards()], singles


def tiled(name: str, work: Work, sites: Iterable[Site], tokens: int) -> Iterator[tuple[list[Site], Tile]]:
    """Sites of equal shapes and biases, with the tile they run on; those that are better left alone not."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for owner, linears in sites:
        if linears:
            key = tuple((*part.weight.shape, part.bias is not None, part.weight.dtype) for part in linears)
            groups.setdefault(key, []).append((owner, linears))
    for group in groups.values():
        tile = choose_tile(name, work, [linears for _, linears in group], tokens)
        if tile is not None:
            yield group, tile


def query_only(attention: Any) -> Callable[[], bool]:
    """Says whether the module is asked for a predicted query (adapter.predicted_query), on a side stream."""
    return lambda: getattr(attention, "offload_handler", None) is stop_at_query


def gated_modules(adapter: ModelAdapter) -> list[tuple[Any, str]]:
    """Gated MLPs of plain linear layers, with their activation."""
    mlps = [module for module in adapter.base.modules() if plain_linears(module, GATED)]
    kinds = [(mlp, activation_of(mlp)) for mlp in mlps if hasattr(mlp, "down_proj")]
    return [(mlp, kind) for mlp, kind in kinds if kind is not None]


def gated_forwards(modules: Sequence[tuple[Any, str]], tokens: int) -> list[Replacement]:
    """Those of gated MLPs."""
    found: list[Replacement] = []
    for activation in ACTIVATIONS:
        mlps = [(mlp, plain_linears(mlp, GATED)) for mlp, kind in modules if kind == activation]
        for sites, tile in tiled(activation, gated_work(activation), mlps, tokens):
            pairs = [(mlp, gated_forward(mlp, activation, tokens, tile)) for mlp, _ in sites]
            found += [(mlp, forward) for mlp, forward in pairs if computes_the_same(mlp, forward, tokens)]
    return found
