"""The label cache of one layer: R numbers of every key, on the GPU."""

from dataclasses import dataclass

import torch

from ..kernels.labels import code_width, make_labels
from .layout import KVLayout


@dataclass
class LabelMaps:
    """How keys and queries become labels: label = key_map (k - key_mean), query label = query_map q."""

    query_map: torch.Tensor  # [Hq, R, D] float32
    key_map: torch.Tensor  # [Hkv, R, D] float32
    key_mean: torch.Tensor  # [Hkv, D] float32


class LabelCache:
    """codes [B, Hkv, N, code_width] and scales [B, Hkv, N, 2]; see kernels/labels.py for the packing."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        self.bits = layout.label_bits
        width = code_width(layout.label_channels, layout.label_bits)
        code_type = torch.float16 if layout.label_bits == 16 else torch.uint8
        scale_tokens = layout.capacity if layout.label_bits < 16 else 0
        heads = (layout.batch, layout.kv_heads)
        self.codes = torch.empty((*heads, layout.capacity, width), dtype=code_type, device=device)
        self.scales = torch.empty((*heads, scale_tokens, 2), dtype=torch.float16, device=device)

    def write(self, keys: torch.Tensor, maps: LabelMaps, starts: torch.Tensor, first: int = 0) -> None:
        """Label keys [b, Hkv, T, D] of the sequences first..first+b, each from its position in starts [b]."""
        span = slice(first, first + keys.shape[0])
        make_labels(
            keys, maps.key_map, maps.key_mean, starts, self.codes[span], self.scales[span], self.bits
        )
