"""Fused forms of small transformers ops, put in place for decode and only where they compute the same.

A norm or rotary function is replaced after a trial on random input shows that
the fused form agrees with the model's own; every other one stays as it is.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .adapter import ModelAdapter
from .agreement import agree
from .forwards import Replacement, replaced
from .kernels.rms_norm import rms_norm
from .kernels.rotary import rotate
from .products import product_forwards
from .residuals import residual_forwards

TRIAL_TOKENS = 2


class Fusion:
    """What of a model can be fused, found once; nothing on a CPU.

    tokens: of a decode step, one a sequence. products: whether its matrix products are too
    (products.py); None where they are in 16 bits on a GPU. residuals: whether such products also
    add the residuals of plain layers (residuals.py).
    """

    def __init__(
        self, adapter: ModelAdapter, tokens: int, products: bool | None = None, residuals: bool = True
    ) -> None:
        on_gpu = adapter.device.type == "cuda"
        self.norms: list[Any] = []
        self.rotary: Any = None
        if on_gpu:
            self.norms = [module for module in adapter.base.modules() if is_plain_rms_norm(module)]
            self.rotary = rotary_module(adapter)
        self.wanted = on_gpu and adapter.dtype.itemsize == 2 if products is None else products
        self.residuals, self.adapter, self.tokens = residuals, adapter, tokens

    @functools.cached_property
    def for_steps(self) -> tuple[list[Replacement], list[Replacement]]:
        """Products and layers of a decode step, found by trials when first asked for: 0.2 s for 32 layers.

        They run parts of the model, so nothing may watch it then.
        """
        if not self.wanted:
            return [], []
        products, singles = product_forwards(self.adapter, self.tokens)
        return products, residual_forwards(self.adapter, singles, self.tokens) if self.residuals else []

    @property
    def products(self) -> list[Replacement]:
        return self.for_steps[0]

    @property
    def layers(self) -> list[Replacement]:
        return self.for_steps[1]

    @contextmanager
    def applied(self, few_tokens: bool = True) -> Iterator[None]:
        """Put the fused forms in place until the context ends; may be entered within itself.

        few_tokens: also those that are made for a decode step: rotary embeddings and products.
        """
        pairs = [(norm, fused_norm(norm)) for norm in self.norms]
        if few_tokens:
            pairs += [*self.products, *self.layers]
        with replaced(pairs), self._rotary_applied() if few_tokens else nullcontext():
            yield

    @contextmanager
    def _rotary_applied(self) -> Iterator[None]:
        if self.rotary is None:
            yield
            return
        plain = self.rotary.apply_rotary_pos_emb
        self.rotary.apply_rotary_pos_emb = fused_rotary(plain)
        try:
            yield
        finally:
            self.rotary.apply_rotary_pos_emb = plain


def fused_norm(norm: Any) -> Any:
    weight, eps = norm.weight, norm.variance_epsilon
    return lambda x: rms_norm(x, weight, eps)


def fused_rotary(plain: Any) -> Any:
    def turn(q: Any, k: Any, cos: Any, sin: Any, *arguments: Any, **keywords: Any) -> Any:
        if cos.shape[-1] != q.shape[-1]:  # partial rotary (Phi-4): the rest of the head stays as it is
            return plain(q, k, cos, sin, *arguments, **keywords)
        return rotate(q, k, cos, sin)

    return turn


def is_plain_rms_norm(module: nn.Module) -> bool:
    """Whether the fused RMSNorm computes what this module does."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not hasattr(module, "variance_epsilon"):
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    trial = torch.randn(TRIAL_TOKENS, len(weight), generator=generator, device=weight.device)
    trial = trial.to(weight.dtype)
    return agree(fused_norm(module)(trial), module(trial))


def rotary_module(adapter: ModelAdapter) -> ModuleType | None:
    """The module whose apply_rotary_pos_emb the attention uses, if the fused form computes the same."""
    module = sys.modules[type(adapter.attentions[0]).__module__]
    plain = getattr(module, "apply_rotary_pos_emb", None)
    if plain is None:
        return None
    device, dtype, dim = adapter.device, adapter.dtype, adapter.head_dim
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    query, key = draw(1, adapter.query_heads, TRIAL_TOKENS, dim), draw(1, adapter.kv_heads, TRIAL_TOKENS, dim)
    angle = draw(1, TRIAL_TOKENS, dim // 2).float().repeat(1, 1, 2)  # [1, T, D]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    try:
        theirs = plain(query, key, cos, sin)
    except (RuntimeError, TypeError):
        return None  # partial rotary or another signature
    ours = rotate(query, key, cos, sin)
    return module if all(agree(a, b) for a, b in zip(ours, theirs, strict=True)) else None
