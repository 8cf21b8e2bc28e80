"""What decode steps cost a prefill that they run beside, and how long they take there.

    python -m bench.beside --kept 0 8 --steps 0 60 --out FILE.json

Five documents of mixed lengths decode (random weights, the Llama-3.1-8B shape); a sixth is prefilled again
and again, each time beside so many steps, spread evenly over it, with so many SMs kept for them
(prefetch/lanes.py).
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.bench.continuous import greedy, load, random_prompts
from offload_runtime.bench.driven import unit_calibration
from offload_runtime.bench.machine import machine
from offload_runtime.continuous import ContinuousBatch
from offload_runtime.pace import Pace
from offload_runtime.prefetch.lanes import Lanes

LENGTHS = (130_048, 98_304, 65_536, 49_152, 32_768)
ANSWER = 4096  # tokens that every document may get: none ends meanwhile
ALONE = 6  # steps timed without a prefill


@dataclass
class GivenPace(Pace):
    """`given` steps beside every prefill."""

    given: int = 0

    def begin(self, *_: Any) -> None:
        self.taken, self.share, self.steps = 0, 0.0, self.given


class Timed(ContinuousBatch):
    """Notes how long each step takes from its launch to its tokens."""

    def prepare(self, kept: int, steps: int) -> None:
        """Keep so many SMs, take so many steps beside the next prefill."""
        self.seconds, self.launched = list[float](), 0.0
        self.lanes, self.crowded = Lanes(self.session.adapter.device, kept), kept > 0
        self.pace = GivenPace(self.pace.places, given=steps)

    def _launch(self) -> None:
        self.launched = time.perf_counter()
        super()._launch()

    def _collect(self) -> None:
        super()._collect()
        self.seconds.append(time.perf_counter() - self.launched)


def measure(batch: Timed, prompt: torch.Tensor, kept: int, steps: int) -> dict[str, Any]:
    """One prefill of the prompt into the free place, which is left again."""
    batch.prepare(kept, steps)
    for _ in range(ALONE):
        batch.step()
    alone = median(batch.seconds)
    batch.seconds.clear()
    place = batch.place_for(len(prompt) + 2)
    assert place is not None
    started = time.perf_counter()
    batch.join(place, prompt, 2, greedy())
    seconds = time.perf_counter() - started
    beside = round(1e3 * fmean(batch.seconds), 1) if batch.seconds else None
    batch.leave(place)
    return {
        "kept_sms": kept, "steps": len(batch.seconds), "prefill_s": round(seconds, 3),
        "step_ms": beside, "step_alone_ms": round(1e3 * alone, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b", help="as in bench/shapes.py, or toy (CPU)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--prompt", type=int, default=65_536, help="tokens of the document prefilled")
    parser.add_argument("--kept", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 60])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sizes = tuple(tokens + ANSWER for tokens in (*options.lengths, options.prompt))
    plain = load(options.shape, max(sizes))
    config = RuntimeConfig(ctx=max(sizes), budget=min(2048, min(sizes)), slots=8192)
    model = OffloadedModel(plain, config)
    model.calibration = unit_calibration(model.adapter)
    batch = Timed(model.continuous(len(sizes), max(sizes), place_tokens=sizes).session)
    batch.prepare(0, 0)
    prompts = random_prompts((*options.lengths, options.prompt), plain.config.vocab_size)
    for place, prompt in enumerate(prompts[:-1]):
        batch.join(place, prompt, ANSWER, greedy())
    measure(batch, prompts[-1], 0, 8)  # compiles what only this combination needs
    lines = []
    for kept in options.kept:
        for steps in options.steps:
            lines.append(measure(batch, prompts[-1], kept, steps))
            print(json.dumps(lines[-1]), flush=True)
    options.out.write_text(json.dumps({"machine": machine(), "results": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
