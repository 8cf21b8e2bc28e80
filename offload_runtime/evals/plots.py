"""Pictures of results, as PNG files. Needs matplotlib: pip install 'ds-offload[eval]'."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import UserError
from .records import Row
from .summary import setting_of

DPI = 130


def pyplot() -> Any:
    """matplotlib.pyplot without a display; UserError when it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib; pip install 'ds-offload[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=DPI)
    pyplot().close(figure)
    return file


def depth_maps(rows: Sequence[Row], out: Path, suite: str) -> list[Path]:
    """For every model a heat map of depth x length, one panel a setting; cells hold the mean score."""
    return [
        depth_map([row for row in rows if row["model"] == model], out / f"{suite}-{model}.png", suite, model)
        for model in dict.fromkeys(row["model"] for row in rows)
    ]


def depth_map(rows: Sequence[Row], file: Path, suite: str, model: str) -> Path:
    settings = list(dict.fromkeys(setting_of(row) for row in rows))
    ctxs, depths = sorted({row["ctx"] for row in rows}), sorted({row["depth"] for row in rows})
    size = (2.2 + max(3.0, 0.62 * len(ctxs)) * len(settings), 1.6 + 0.42 * len(depths))
    figure, panels = pyplot().subplots(1, len(settings), figsize=size, sharey=True, squeeze=False)
    for panel, setting in zip(panels[0], settings, strict=True):
        mine = [row for row in rows if setting_of(row) == setting]
        cells = [[mean_at(mine, ctx, depth) for ctx in ctxs] for depth in depths]
        trials = sum(1 for row in mine)
        draw_cells(panel, cells, [f"{ctx:,}" for ctx in ctxs], [f"{100 * depth:.0f}" for depth in depths])
        panel.set_title(f"{setting.label}\n{fmean(r['score'] for r in mine):.1%} of {trials}", fontsize=9)
        panel.set_xlabel("context, tokens")
    panels[0][0].set_ylabel("depth, %")
    figure.suptitle(f"{suite}: {model}", fontsize=10)
    figure.tight_layout()
    return save(figure, file)


def mean_at(rows: Sequence[Row], ctx: int, depth: float) -> float:
    scores = [row["score"] for row in rows if row["ctx"] == ctx and row["depth"] == depth]
    return fmean(scores) if scores else float("nan")


def draw_cells(
    panel: Any,
    cells: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    limits: tuple[float, float] = (0.0, 1.0),
    colours: str = "RdYlGn",
    form: str = "{:.2f}",
) -> None:
    """A grid of coloured numbers; nan stays white."""
    panel.imshow(cells, vmin=limits[0], vmax=limits[1], cmap=colours, alpha=0.75, aspect="auto")
    panel.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
    panel.set_yticks(range(len(rows)), rows, fontsize=7)
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if value == value:
                panel.text(x, y, form.format(value), ha="center", va="center", fontsize=7)


def score_bars(rows: Sequence[Row], out: Path, suite: str) -> list[Path]:
    """For every model the mean score by task and context, one bar a setting."""
    files = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        files.append(task_bars(mine, out / f"{suite}-{model}.png", f"{suite}: {model}"))
    return files


def task_bars(rows: Sequence[Row], file: Path, title: str) -> Path:
    settings = list(dict.fromkeys(setting_of(row) for row in rows))
    places = list(dict.fromkeys((row["task"], row["ctx"]) for row in rows))
    figure, panel = pyplot().subplots(figsize=(2 + 1.1 * len(places) + 0.2 * len(settings), 4))
    width = 0.8 / len(settings)
    for index, setting in enumerate(settings):
        means = [
            fmean(scores) if scores else 0.0
            for task, ctx in places
            for scores in [
                [
                    r["score"]
                    for r in rows
                    if setting_of(r) == setting and (r["task"], r["ctx"]) == (task, ctx)
                ]
            ]
        ]
        panel.bar(
            [x + (index + 0.5) * width - 0.4 for x in range(len(places))], means, width, label=setting.label
        )
    panel.set_xticks(range(len(places)), [f"{t}\n{c:,}" for t, c in places], fontsize=8)
    panel.set(ylabel="score", ylim=(0, 1), title=title)
    panel.legend(fontsize=7)
    figure.tight_layout()
    return save(figure, file)
