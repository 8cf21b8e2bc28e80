"""GPTQ and AWQ checkpoints through transformers' own loader, or one line that names the missing packages."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from offload_runtime import OffloadedModel
from offload_runtime.errors import UserError
from offload_runtime.loading import CHECKPOINT_PACKAGES
from offload_runtime.weights import loaded_weights

from .models import logits_of, random_ids

GROUP = 32  # weights that share a scale
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns each nibble holds, lowest first


def nibbles(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit codes of the last dimension in each int32: [..., N] to [..., N / 8]."""
    eights = codes.unflatten(-1, (-1, 8))[..., list(order)].long()
    words = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0-15 [in, out] with zero at 8 and float16 scales [in / GROUP, out] of a weight [out, in]."""
    groups = weight.T.unflatten(0, (-1, GROUP))  # [in / GROUP, GROUP, out]
    scales = (groups.abs().amax(1) / 7).half()
    codes = (groups / scales.float()[:, None]).round().clamp(-7, 7) + 8
    return codes.flatten(0, 1), scales


def gptq(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Packed along the inputs; zeros are stored less one."""
    zeros = torch.full_like(scales, 7)
    index = torch.arange(len(codes), dtype=torch.int32) // GROUP
    return {"qweight": nibbles(codes.T).T, "qzeros": nibbles(zeros), "scales": scales, "g_idx": index}


def awq(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Packed along the outputs, in an order of its own."""
    zeros = nibbles(torch.full_like(scales, 8), AWQ_ORDER)
    return {"qweight": nibbles(codes, AWQ_ORDER), "qzeros": zeros, "scales": scales}


PACKERS: dict[str, tuple[Callable[..., dict[str, torch.Tensor]], dict[str, object]]] = {
    "gptq": (gptq, {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}


def checkpoint(folder: Path, method: str) -> LlamaForCausalLM:
    """A packed Llama's directory; returns the model of the same rounded weights, unpacked."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.15, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    pack, fields = PACKERS[method]
    tensors = load_file(folder / "model.safetensors")
    for name, part in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(part, torch.nn.Linear):
            codes, scales = rounded(part.weight.data)
            part.weight.data = ((codes - 8) * scales.float().repeat_interleave(GROUP, 0)).T.contiguous()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in pack(codes, scales).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    quantisation = {"quant_method": method, **fields}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantisation}))
    return model


def missing(method: str) -> list[str]:
    return [name for name in CHECKPOINT_PACKAGES[method] if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("method", PACKERS)
def test_missing_packages_are_named_in_one_line(method, tmp_path, monkeypatch):
    checkpoint(tmp_path, method)
    plain = importlib.util.find_spec
    hidden = ("accelerate", *CHECKPOINT_PACKAGES[method])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else plain(name))
    with pytest.raises(UserError) as caught:
        OffloadedModel.from_pretrained(tmp_path, device="cpu")
    names = " ".join(name for name in hidden)
    assert str(caught.value).endswith(f"to load {method} weights: pip install {names}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", PACKERS)
def test_packed_checkpoint_equals_its_unpacked_weights(method, tmp_path, device):
    """transformers' own loader packs nothing anew: the logits are those of the same rounded weights."""
    if missing(method):
        pytest.skip(f"needs {' and '.join(missing(method))}: pip install")
    unpacked, ids = checkpoint(tmp_path, method).to(device), random_ids(90, device=device)
    settings = {"device": device, "dtype": "float32", "ctx": 512, "budget": "1/1", "chunk_tokens": 64}
    runtime = OffloadedModel.from_pretrained(tmp_path, **settings)
    assert not isinstance(runtime.model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert loaded_weights(runtime.model).largest == 128 * 256
    _, expected = logits_of(unpacked.generate, ids, 8)
    _, got = logits_of(runtime.generate, ids, 8)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0.2)  # its kernels multiply in 16 bit
