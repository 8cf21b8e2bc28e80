"""The parts of bench.prefill --full: which rows there are, in which order, and about how long each takes."""

from functools import partial
from pathlib import Path

from offload_runtime.bench.prefill_full import PrefillBench

FEW_LAYERS = 8  # of transformers' rows that are too long or too large with all
PROFILED_LAYERS = 4


def run_document(bench: PrefillBench, snapshot: Path | None) -> None:
    """The longest document on a small card, saved, asked, loaded and asked; without the cap if it fails."""
    add, ctx = bench.rows.add, bench.contexts[-1]
    add("planned peaks above the weights, GiB", lambda: bench.planned_peaks(ctx))
    cost = bench.expected_s(ctx)
    if not add(f"ours {ctx}, on a card of {bench.card_gb:g} GB", lambda: bench.small_card(ctx), cost):
        add(f"ours {ctx}", lambda: bench.ours(ctx, keep=True), cost)
    if bench.held is None:
        return
    if snapshot is not None:
        add("save the document's cache", lambda: bench.save(snapshot), 40)
    add("second question, in process", lambda: bench.second_question(ctx), 10)
    bench.held.close()
    bench.held = None
    if snapshot is not None and snapshot.is_dir():
        add("second question, from the snapshot", lambda: bench.from_snapshot(ctx, snapshot), 35)


def run_ours(bench: PrefillBench) -> None:
    add, contexts = bench.rows.add, bench.contexts
    add("ours, first run (compiles)", lambda: bench.ours(contexts[0]), 30)
    for ctx in contexts[:-1]:
        add(f"ours {ctx}", partial(bench.ours, ctx), bench.expected_s(ctx))
    add(f"ours, a shorter prompt after {contexts[0]}", partial(bench.shorter, contexts[0]), 6)


def run_theirs(bench: PrefillBench, offloading: bool) -> None:
    """transformers' own prefill; with fewer layers where all would take too long or too much memory."""
    add, contexts, every = bench.rows.add, bench.contexts, bench.layers
    few, longest = min(FEW_LAYERS, every), contexts[-1]
    name = "transformers, offloaded cache" if offloading else "transformers, DynamicCache"
    for ctx in contexts:
        layers = few if ctx == longest or (offloading and ctx > longest // 4) else every
        if layers < every and (ctx, layers) not in bench.logits:
            cost = bench.expected_s(ctx) * layers / every
            add(f"ours {ctx}, {layers} layers", partial(bench.ours, ctx, few), cost)
        # Its attention at half our rate, and no chunks (arithmetic).
        cost = 1.6 * bench.expected_s(ctx) * layers / every
        add(f"{name} {ctx}", partial(bench.theirs, ctx, offloading, layers), cost)


def run_profile(bench: PrefillBench) -> None:
    ctx, layers = bench.contexts[-1], min(PROFILED_LAYERS, bench.layers)
    bench.rows.add("where the time goes", lambda: bench.profile(ctx, layers), bench.expected_s(ctx) / 3)


def run_whole(bench: PrefillBench) -> None:
    """What all layers of transformers' prefill take at the longest context, or that they do not fit."""
    ctx, every = bench.contexts[-1], bench.layers
    name = f"transformers, DynamicCache {ctx}, all layers"
    bench.rows.add(name, lambda: bench.theirs(ctx, False, every), 2 * bench.expected_s(ctx))
