"""Bits per byte of held-out text, decoded through the sparse path.

A long prefix is prefilled; then the true next tokens go through the decode steps
one by one, and every prediction is scored (teacher forcing). The first token's
prediction comes from the dense prefill, so it is fed but not counted.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..engine import OffloadedModel
from ..errors import RunError, UserError
from .asking import ForcedTokens, cost, greedy
from .cases import Case, Group, Tokens
from .plots import draw_cells, pyplot, save
from .records import Row
from .runner import Report
from .summary import by_point, case_of, dense_rows, make_table, point_cells, setting_of


def groups(tokens: Tokens, ctx: int, text: str, pieces: int, scored: int) -> list[Group]:
    """Pieces of ctx tokens spread over the text; the last `scored` of each are decoded and counted."""
    ids, begin = tokens.rest(text), tokens.prefix("")
    body = ctx - len(begin)
    if body < scored + 2:
        raise UserError(
            f"--ctx {ctx} leaves no prefix before {scored} scored tokens; raise it or lower --tokens"
        )
    if len(ids) < body:
        raise UserError(f"the text has {len(ids)} tokens and --ctx is {ctx}; give a longer --text")
    made = []
    for piece in range(pieces):
        start = (len(ids) - body) * piece // max(1, pieces - 1)
        span = ids[start : start + body]
        prefix = torch.cat([begin, span[: body - scored - 1]])
        case = Case(f"piece {piece}", span[body - scored - 1 :])
        made.append(Group("text", ctx, prefix, (case,), new_tokens=0))
    return made


def measure(
    model: OffloadedModel, group: Group, cases: Sequence[Case], resume: bool = False
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """nats: minus the log-probability of the counted tokens, summed; bytes: of their text.

    resume: the group's prefix is in the caches.
    """
    for case in cases:
        forced = ForcedTokens(case.ids)
        model.generate(group.prefix[None], max_new_tokens=len(case.ids), resume=resume, **greedy(forced))
        if len(forced.logprobs) < len(case.ids):
            raise RunError("the text holds the model's end token, which ends decoding; give a plain text")
        counted = case.ids[1:]
        nats = -sum(float(value) for value in forced.logprobs[1:])
        size = len(Tokens(model.tokenizer).text(counted).encode())
        yield (
            case,
            {
                "nats": nats,
                "tokens": len(counted),
                "bytes": size,
                "bits_per_byte": nats / math.log(2) / size,
                **cost(model),
            },
        )


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Bits per byte and perplexity of every point; `more`: bits over dense on the same pieces, less 1."""
    dense = dense_rows(rows)
    lines = []
    for point, mine in by_point(rows):
        nats, same = sum(r["nats"] for r in mine), [r for r in mine if case_of(r) in dense]
        reference = sum(dense[case_of(r)]["nats"] for r in same)
        lines.append(
            point
            | {
                "tokens": sum(r["tokens"] for r in mine),
                "bits_per_byte": nats / math.log(2) / sum(r["bytes"] for r in mine),
                "perplexity": math.exp(nats / sum(r["tokens"] for r in mine)),
                "more": sum(r["nats"] for r in same) / reference - 1 if same else None,
            }
        )
    return lines


def table(lines: Sequence[dict[str, Any]]) -> Table:
    names = ("ctx", "tokens scored", "bits/byte", "% above dense", "perplexity a token")
    made = make_table("bits: held-out text through the decode path", names, lines)
    for line in lines:
        more = "-" if line["more"] is None else f"{100 * line['more']:+.2f}"
        figures = (f"{line['bits_per_byte']:.4f}", more, f"{line['perplexity']:.3f}")
        made.add_row(*point_cells(line, lines), str(line["ctx"]), str(line["tokens"]), *figures)
    return made


def report(rows: list[Row], out: Path) -> Report:
    lines = summarise(rows)
    pictures = []
    for model in dict.fromkeys(line["model"] for line in lines):
        for ctx in dict.fromkeys(line["ctx"] for line in lines):
            mine = [
                li for li in lines if (li["model"], li["ctx"]) == (model, ctx) and not setting_of(li).is_dense
            ]
            if mine:
                pictures.append(draw(mine, out / f"bits-{model}-{ctx}.png", f"{model}, {ctx:,} tokens"))
    return Report(lines, table(lines), pictures)


def labels_name(line: dict[str, Any]) -> str:
    """A setting without its budget."""
    return setting_of(line).label.split(", ", 1)[1]


def draw(lines: Sequence[dict[str, Any]], file: Path, title: str) -> Path:
    """Bits over dense in percent: curves over the budget, and the same as a heat map."""
    kinds = list(dict.fromkeys(labels_name(line) for line in lines))
    budgets = list(dict.fromkeys(line["budget"] for line in lines))
    value = {
        (labels_name(line), line["budget"]): 100 * line["more"] for line in lines if line["more"] is not None
    }
    size = (8 + 0.7 * len(budgets), 2 + max(2.5, 0.35 * len(kinds)))
    figure, (curves, cells) = pyplot().subplots(1, 2, figsize=size)
    for kind in kinds:
        points = [(at, value[kind, b]) for at, b in enumerate(budgets) if (kind, b) in value]
        if points:
            curves.plot(*zip(*points, strict=True), "o-", label=kind)
    curves.axhline(0, color="grey", ls="--", label="dense")
    curves.set_xticks(range(len(budgets)), budgets)
    curves.set(xlabel="budget", ylabel="bits above dense, %")
    curves.legend(fontsize=7)
    grid = [[value.get((kind, b), float("nan")) for b in budgets] for kind in kinds]
    worst = max([0.01, *(abs(v) for v in value.values())])
    draw_cells(cells, grid, budgets, kinds, (-worst, worst), "RdYlGn_r", "{:+.2f}")
    cells.set(xlabel="budget", title="bits above dense, %")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return save(figure, file)
