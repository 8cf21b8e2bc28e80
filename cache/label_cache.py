"""The label cache of one layer: R numbers of every key, on the GPU."""

import torch

from ..kernels.labels import code_width, make_labels
from .layout import KVLayout


class LabelMaps:
    """How keys and queries become labels: label = key_map (k - key_mean), query label = query_map q.

    The tensors stay where they are for the life of a cache, because captured
    CUDA graphs read them; `set` changes what they hold.
    """

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        width, dim = layout.label_channels, layout.head_dim

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.query_map = zeros(layout.query_heads, width, dim)
        self.key_map = zeros(layout.kv_heads, width, dim)
        self.key_mean = zeros(layout.kv_heads, dim)

    def set(self, query_map: torch.Tensor, key_map: torch.Tensor, key_mean: torch.Tensor) -> None:
        """Take over maps [Hq, R, D] and [Hkv, R, D] and the mean [Hkv, D]; channels past R stay zero."""
        self.query_map.zero_()[:, : query_map.shape[1]] = query_map
        self.key_map.zero_()[:, : key_map.shape[1]] = key_map
        self.key_mean.copy_(key_mean)

    def copy_from(self, other: "LabelMaps") -> None:
        self.set(other.query_map, other.key_map, other.key_mean)


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
