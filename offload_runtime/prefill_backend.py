"""The attention that a session's prefills run on, chosen by measurement at the first long prompt."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch

from .kernels.attention_trial import candidates, event_ms, try_all
from .kernels.split_attention import Attention, flash_attention

log = logging.getLogger(__name__)

# Chunks before the one that is timed: three are two pieces, so that the trial sees every kind of merge.
TRIAL_CHUNKS = 3
# Of flash attention's time: two trials of one kernel differ by up to 6 % (H100, 1.68 to 1.78 ms).
CLEARLY = 0.9


class PrefillBackend:
    """Full chunks go to the attention that won the trial, other lengths to flash attention.

    Why: every length costs cuDNN plans of its own, and a prompt has one chunk that is not full.
    """

    def __init__(self) -> None:
        self.name = "flash"
        self.attention: Attention = flash_attention
        self.full_chunk = 0  # tokens; 0 before a trial
        self.trial: dict[str, float | str] = {}

    def choose(self, rows: torch.Tensor, query_heads: int, chunk: int, tokens: int) -> None:
        """Try all attentions at a full chunk, unless that is known; rows [Hkv, S, 2 D] are overwritten.

        The trial uses the run's own buffer, whose strides cuDNN's plans are made for.
        tokens: of the run; one of fewer than four chunks is not worth it.
        """
        wide = rows.dtype not in (torch.bfloat16, torch.float16)
        if wide or not rows.is_cuda or chunk == self.full_chunk or tokens < (TRIAL_CHUNKS + 1) * chunk:
            return
        self.trial = dict(trial_of_process(rows, query_heads, chunk))
        self.name = fastest(self.trial)
        self.attention, self.full_chunk = candidates()[self.name], chunk
        log.info("prefill attention: %s, of %s", self.name, self.trial)

    def attend(self, query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
        """As split_attention.Attention. An attention that fails is left for flash, in plain sight."""
        if query.shape[2] != self.full_chunk:
            return flash_attention(query, rows, scale)
        try:
            return self.attention(query, rows, scale)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.name == "flash":
                raise
            log.warning("%s attention failed, going on with flash attention: %s", self.name, error)
            self.trial[self.name] = "failed during a prefill"
            self.name, self.attention = "flash", flash_attention
            return flash_attention(query, rows, scale)

    def figures(self) -> dict[str, Any]:
        """For stats: the attention in use and each one's milliseconds or why it was out."""
        return {"attention": self.name, "attention_trial_ms": dict(self.trial)}


def fastest(trial: Mapping[str, float | str]) -> str:
    """The fastest of a trial; flash attention unless another is clearly faster."""
    times = {name: result for name, result in trial.items() if isinstance(result, float)}
    best = min(times, key=lambda name: times[name]) if times else "flash"
    return best if times.get(best, 0.0) < CLEARLY * times.get("flash", 0.0) else "flash"


def trial_of_process(rows: torch.Tensor, query_heads: int, chunk: int) -> Mapping[str, float | str]:
    """One trial a process and shape: sessions that chose by trials of their own could prefill differently.

    rows [Hkv, S, 2 D] are overwritten by a trial, and zero afterwards.
    """
    shape = (rows.device.index, rows.dtype, query_heads, rows.shape[0], rows.shape[2], chunk)
    known = trials()
    if shape not in known:
        known[shape] = new_trial(rows, query_heads, chunk)
    return known[shape]


@functools.cache
def trials() -> dict[tuple[Any, ...], Mapping[str, float | str]]:
    """The trials of this process by shape."""
    return {}


def new_trial(rows: torch.Tensor, query_heads: int, chunk: int) -> Mapping[str, float | str]:
    """Milliseconds of every attention on random rows, in the run's own buffer."""
    dim = rows.shape[2] // 2
    generator = torch.Generator(rows.device).manual_seed(0)
    used = rows[:, : (TRIAL_CHUNKS + 1) * chunk]
    used.normal_(generator=generator)
    used[:, TRIAL_CHUNKS * chunk :, dim:] += 1  # so that a wrong merge shows in every number
    shape = (1, chunk, query_heads, dim)
    query = torch.randn(shape, generator=generator, dtype=rows.dtype, device=rows.device)
    trial = try_all(candidates(), query.transpose(1, 2), used, dim**-0.5, event_ms)
    used.zero_()
    return trial
