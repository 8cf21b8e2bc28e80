"""Labels: the few numbers kept of every key, from which decoding guesses q.k.

label = key_map (k - key_mean), stored as float16 or as 8- or 4-bit codes with
one (scale, offset) pair a token. Choosing R channels (Double Sparsity, arXiv
2408.07092 section 3) is the case where the rows of key_map are unit vectors.
4-bit codes hold channel r in the low nibble of byte r and channel r + R/2 in
its high nibble, so that a kernel unpacks them without a shuffle.
"""

import torch
import triton
import triton.language as tl


def code_width(channels: int, bits: int) -> int:
    """Elements of one token's codes: float16 numbers at 16 bits, else bytes."""
    return channels // 2 if bits == 4 else channels


def make_labels_reference(
    keys: torch.Tensor,
    key_map: torch.Tensor,
    key_mean: torch.Tensor,
    starts: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
) -> None:
    """Write the labels of T consecutive tokens into the label cache, in place.

    keys [B, Hkv, T, D] (after RoPE); key_map [Hkv, R, D] and key_mean [Hkv, D]
    float32; starts [B] int32: the position of each sequence's first key;
    codes [B, Hkv, N, code_width]; scales [B, Hkv, N, 2] float16 (scale, offset),
    untouched at 16 bits.
    """
    tokens = keys.shape[2]
    centred = keys.float() - key_mean[None, :, None, :]
    labels = torch.einsum("bhtd,hrd->bhtr", centred, key_map)  # [B, Hkv, T, R]
    for b, start in enumerate(starts.tolist()):
        if bits == 16:
            codes[b, :, start : start + tokens] = labels[b].to(codes.dtype)
            continue
        packed, pair = quantise(labels[b], bits)
        codes[b, :, start : start + tokens] = packed
        scales[b, :, start : start + tokens] = pair


def quantise(labels: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Asymmetric codes of [..., R] float32 labels: bytes and [..., 2] float16 (scale, offset)."""
    offset = labels.amin(-1, keepdim=True).half().float()
    scale = ((labels.amax(-1, keepdim=True) - offset) / (2**bits - 1)).half().float()
    safe_scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    code = ((labels - offset) / safe_scale + 0.5).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        half = code.shape[-1] // 2
        code = code[..., :half] | (code[..., half:] << 4)
    return code, torch.cat([scale, offset], -1).half()


def read_labels(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The float32 labels [..., R] that codes [..., code_width] and scales [..., 2] stand for."""
    if bits == 16:
        return codes.float()
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)  # [..., R]
    return codes.float() * scales[..., :1].float() + scales[..., 1:].float()
