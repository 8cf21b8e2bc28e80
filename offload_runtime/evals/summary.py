"""From rows to a table: what each setting scored, beside dense attention on the same cases."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from .grid import Setting
from .records import Row

POINT = ("model", "ctx", "budget", "channels", "bits", "prefetch", "new_rows", "task")  # a line of the table


def setting_of(row: Row) -> Setting:
    return Setting(row["budget"], row["channels"], row["bits"], row["prefetch"], row.get("new_rows", "none"))


def point_of(row: Row) -> dict[str, Any]:
    """The grid point that a row belongs to; rows of before there was new_rows were selected exactly."""
    return {name: row.get("new_rows", "none") if name == "new_rows" else row[name] for name in POINT}


def by_point(rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Every point of the grid with its rows, in the order in which they first come."""
    points: dict[tuple[Any, ...], tuple[dict[str, Any], list[Row]]] = {}
    for row in rows:
        point = point_of(row)
        points.setdefault(tuple(point.values()), (point, []))[1].append(row)
    return list(points.values())


def dense_rows(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    return {case_of(row): row for row in rows if setting_of(row).is_dense}


def case_of(row: Row) -> tuple[Any, ...]:
    return (row["model"], row["task"], row["ctx"], row["case"])


def summarise(rows: Sequence[Row], right: float | None) -> list[dict[str, Any]]:
    """Mean scores by point of the grid.

    right: the score from which dense counts as right; `kept` is then the mean score on
    the cases that dense gets right, and None where it gets none. Both are left out
    where there is no dense reference, or with right=None.
    """
    dense = dense_rows(rows)
    lines = []
    for point, mine in by_point(rows):
        reference = [dense[case_of(row)] for row in mine if case_of(row) in dense]
        line = point | {
            "cases": len(mine),
            "score": fmean(row["score"] for row in mine),
            "dense": fmean(row["score"] for row in reference) if reference else None,
        }
        if right is not None and reference:
            easy = [row for row in mine if dense.get(case_of(row), {"score": 0})["score"] >= right]
            line |= {
                "dense_wrong": len(mine) - len(easy),
                "kept": fmean(row["score"] for row in easy) if easy else None,
            }
        lines.append(line)
    return lines


def with_averages(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines and, where a setting has several tasks, their unweighted mean as LongBench reports it."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        settings.setdefault(tuple(line[name] for name in POINT[:-1]), []).append(line)
    means = []
    for point, mine in settings.items():
        if len(mine) > 1:
            mean = dict(zip(POINT, (*point, "average of tasks"), strict=True))
            mean["cases"] = sum(line["cases"] for line in mine)
            for name in ("score", "dense"):
                values = [line[name] for line in mine if line[name] is not None]
                mean[name] = fmean(values) if values else None
            means.append(mean)
    return lines + means


def table(lines: Sequence[dict[str, Any]], title: str) -> Table:
    """One line a point; scores in percent, the difference in points."""
    names = ("task", "ctx", "cases", "%", "dense %", "points", "dense wrong", "% where dense is right")
    made = make_table(title, names, lines)
    for line in lines:
        score, dense = line["score"], line["dense"]
        made.add_row(
            *point_cells(line, lines),
            line["task"],
            str(line["ctx"]),
            str(line["cases"]),
            percent(score),
            percent(dense),
            "-" if dense is None else f"{100 * (score - dense):+.1f}",
            str(line.get("dense_wrong", "-")),
            percent(line.get("kept")),
        )
    return made


def make_table(title: str, names: Sequence[str], lines: Sequence[dict[str, Any]]) -> Table:
    """An empty table for lines of the grid; the model is a column only where there are several."""
    models = {line["model"] for line in lines}
    made = Table(title=title if len(models) > 1 else f"{title}, {next(iter(models), '')}")
    if len(models) > 1:
        made.add_column("model")
    made.add_column("setting", no_wrap=True)
    for name in names:
        made.add_column(name)
    return made


def point_cells(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> list[str]:
    """The first cells of a line: the model where there are several, and the setting."""
    several = len({other["model"] for other in lines}) > 1
    return [*([line["model"]] if several else []), setting_of(line).label]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
