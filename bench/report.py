"""The growing report: rows are written as they finish, then compared, then printed."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offload_runtime.json_file import write_json

GROUP = ("shape", "ctx", "batch")  # rows of equal values stand in one table
SETTING = ("what", "shape", "budget", "prefetch", "new_rows", "resident", "locality")
AGAINST = {"dense": "vs_dense", "streaming": "vs_streaming", "hf-offloaded": "vs_hf_offloaded"}


class Report:
    """A JSON object in memory and, with a file, on disk after every row."""

    def __init__(self, file: Path | None, head: dict[str, Any]) -> None:
        self.file = file
        self.data: dict[str, Any] = {**head, "cost_cards": [], "rows": []}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished row and compare all again."""
        self.rows.append(row)
        for each in self.rows:
            for baseline, name in AGAINST.items():
                each[name] = self._times_faster(each, baseline)
        self.write()

    def _times_faster(self, row: dict[str, Any], baseline: str) -> float | None:
        """The baseline's time over the row's, in the same group; None without either."""
        base = [
            other["tpot_ms"]
            for other in self.rows
            if other["what"] == baseline and all(other[name] == row[name] for name in GROUP)
        ]
        if not base or base[0] is None or row["tpot_ms"] is None:
            return None
        return round(base[0] / row["tpot_ms"], 3)

    def finish(self) -> None:
        """Add what contexts and batches do to the same setting."""
        self.data["growth"] = self._scaling("ctx", "batch", "tpot_ms")
        self.data["batch_gain"] = self._scaling("batch", "ctx", "tokens_per_s")
        self.write()

    def _scaling(self, along: str, fixed: str, figure: str) -> list[dict[str, Any]]:
        """figure at the largest value of `along` over the figure at the smallest, setting by setting."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            if row[figure] is not None:
                groups.setdefault(tuple(row[name] for name in (*SETTING, fixed)), []).append(row)
        found = []
        for key, rows in groups.items():
            low, high = min(rows, key=lambda r: r[along]), max(rows, key=lambda r: r[along])
            if low[along] < high[along]:
                line = dict(zip((*SETTING, fixed), key, strict=True))
                line |= {"from": low[along], "to": high[along], "ratio": round(high[figure] / low[figure], 3)}
                found.append(line)
        return found

    def write(self) -> None:
        """The whole file or nothing."""
        if self.file is not None:
            write_json(self.file, self.data)


def print_card(console: Console, card: dict[str, Any]) -> None:
    """The cost card of one shape, context and batch."""
    title = f"{card['shape']}: {card['batch']} x {card['ctx']} tokens, {card['dtype']}"
    table = Table("a step moves", "GB", "at ceilings", title=title)
    table.add_row("weights", number(card["weights_gb"]), "")
    table.add_row("dense: all KV, in GPU memory", number(card["kv_gb"]), ms(card["dense_floor_ms"]))
    table.add_row("streaming: all KV, over the link", number(card["kv_gb"]), ms(card["streaming_floor_ms"]))
    for line in card["budgets"]:
        name = f"budget {line['budget']}"
        table.add_row(f"{name}: labels, once", number(line["labels_gb"]), "")
        table.add_row(f"{name}: rows, none resident", number(line["rows_gb"]), ms(line["link_ms"]) + " link")
        table.add_row(f"{name}: floor", "", ms(line["floor_ms"]))
    console.print(table)
    ceilings = f"measured: link {number(card['link_gb_s'])} GB/s, HBM {number(card['hbm_gb_s'])} GB/s"
    console.print(ceilings if card["link_gb_s"] else "no GPU: neither link nor HBM to measure", style="dim")


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """One table a group of rows."""
    for group in dict.fromkeys(tuple(row[name] for name in GROUP) for row in rows):
        shape, ctx, batch = group
        table = Table(title=f"{shape}: {batch} x {ctx} tokens, medians")
        for name in ("what", "resident", "locality", "steps", "ms", "tokens/s", "x dense", "x streaming"):
            table.add_column(name)
        for name in ("moved / selected", "GB moved", "link GB/s", "% of link", "GPU GB", "pinned GB"):
            table.add_column(name, justify="right")
        for row in rows:
            if tuple(row[name] for name in GROUP) == group:
                table.add_row(*cells(row))
        console.print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells; one that failed says why in place of its time."""
    what = row["what"]
    if what == "ds-offload":
        what = f"{row['budget']} {row['prefetch']}"
        what += "" if row["new_rows"] is None else f" sticky {row['new_rows']}"
    place = [what, row["resident"] or "", row["locality"] or "", str(row["steps"] or "")]
    if row["error"] is not None:
        return [*place, row["error"], *[""] * 9]
    figures = (
        "tpot_ms", "tokens_per_s", "vs_dense", "vs_streaming", "moved_of_selected", "moved_gb", "link_gb_s",
        "link_percent", "gpu_gb", "pinned_gb",
    )  # fmt: skip
    return [*place, *(number(row[name]) for name in figures)]


def number(value: float | None) -> str:
    """Three decimals below ten, one above; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def ms(value: float | None) -> str:
    return "" if value is None else f"{number(value)} ms"
