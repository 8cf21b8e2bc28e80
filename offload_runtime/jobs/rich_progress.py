"""A job on a terminal: a bar of documents, and below it one for each that is at work."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from .link import LinkRate
from .progress import Pace, Watcher, clock, in_words
from .worker import Outcome

NAME = 40  # characters of a document's id that fit beside the bar


class JobBars(Watcher):
    """Bars that disappear at the end; failures stay as lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True)
        self.job = self.progress.add_task("documents", total=None, note="")
        self.at_work: dict[str, TaskID] = {}  # by document
        self.memory = ""
        self.pace = Pace(0, 0)
        self.link = LinkRate()

    def start(self, documents: int, size: int) -> None:
        self.pace = Pace(documents, size)
        self.progress.update(self.job, total=size)
        self.progress.start()
        self._tell()

    def stage(self, name: str, stage: str, done: int, total: int) -> None:
        if name not in self.at_work:
            self.at_work[name] = self.progress.add_task("", total=None, note="")
            self._tell()
        self.progress.update(
            self.at_work[name], description=f"{name[-NAME:]}: {stage}", completed=done, total=total or None
        )

    def finish(self, outcome: Outcome, size: int) -> None:
        record = outcome.record
        self.pace.add(record, size)
        task = self.at_work.pop(record["id"], None)
        if task is not None:
            self.progress.remove_task(task)
        if record["error"]:
            self.console.print(f"{record['id']}: {in_words(record)}", markup=False, highlight=False)
        if outcome.answers:
            last = outcome.answers[-1]
            gpu = "" if last.gpu_peak_gb is None else f"GPU {last.gpu_peak_gb:.1f} GB, "
            self.memory = f"{gpu}host rows {last.pinned_gb:.1f} GB"
        self._tell()

    def _tell(self) -> None:
        pace = self.pace
        failed = f", {pace.failed} failed" if pace.failed else ""
        notes = [f"{len(self.at_work)} at work", self.memory, self.link.words()]
        if pace.left_s is not None:
            notes = [f"{pace.tokens_per_s:.0f} tokens/s, {clock(pace.left_s)} left", *notes]
        self.progress.update(
            self.job,
            description=f"{pace.done}/{pace.documents} documents{failed}",
            completed=pace.done_size,
            note=", ".join(filter(None, notes)),
        )

    def close(self) -> None:
        self.progress.stop()
        self.link.close()
