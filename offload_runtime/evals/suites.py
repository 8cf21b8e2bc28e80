"""The suites by name: what each asks, how it judges, and how it reports."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..cli_generate import check_file, read_text
from ..demo import shipped_prose
from ..errors import UserError
from . import attention, bits, key_values, lines, longbench, metrics, passkey, ruler
from .asking import make_measure
from .cases import Groups
from .grid import fractions, integers, words
from .plots import depth_maps, score_bars
from .records import Row
from .runner import Report, Suite
from .summary import summarise, table, with_averages

NAMES = ("passkey", "lines", "kv", "bits", "longbench", "ruler", "attention")


@dataclass(frozen=True)
class Wanted:
    """The options of single suites; a suite reads those that it has a use for."""

    files: tuple[Path, ...] = ()
    text: Path | None = None
    depths: str = "0,0.14,0.28,0.42,0.57,0.71,0.85,1"
    tasks: str = ",".join(ruler.TASKS)
    documents: int = 1
    tokens: int = 256
    limit: int = 1_000_000
    seed: int = 0
    chat: bool = False
    decode_question: bool = False


def lengths(text: str) -> list[int]:
    """--ctx as a list."""
    values = integers(text, "--ctx")
    if min(values) < 1:
        raise UserError(f"--ctx is {text!r}; its numbers must be at least 1")
    return values


def choose(name: str, wanted: Wanted) -> Suite:
    """The suite of that name; UserError when there is none or a file of it is missing."""
    if name not in NAMES:
        raise UserError(f"there is no suite {name!r}; choose one of {', '.join(NAMES)}")
    for file in wanted.files:
        check_file(str(file), "--file")
    if wanted.text is not None:
        check_file(str(wanted.text), "--text")
    if min(wanted.documents, wanted.limit, wanted.tokens) < 1:
        raise UserError("--documents, --limit and --tokens must be at least 1")
    makers = (
        passkey_suite,
        lines_suite,
        kv_suite,
        bits_suite,
        longbench_suite,
        ruler_suite,
        attention_suite,
    )
    return dict(zip(NAMES, makers, strict=True))[name](wanted)


def asking(
    name: str,
    wanted: Wanted,
    groups: Groups,
    metric_of: Callable[[str], metrics.Metric],
    report: Callable[[list[Row], Path], Report],
) -> Suite:
    """A suite of questions with judged answers."""
    options = {"seed": wanted.seed, "chat": wanted.chat, "decode_question": wanted.decode_question}
    measure = make_measure(metric_of, wanted.decode_question)
    return Suite(name, groups, measure, report, options, wanted.chat)


def passkey_suite(wanted: Wanted) -> Suite:
    prose = None if wanted.text is None else read_text(str(wanted.text))
    depths = fractions(wanted.depths, "--depths")
    groups = partial(passkey.groups, depths=depths, documents=wanted.documents, seed=wanted.seed, prose=prose)
    report = partial(retrieval_report, suite="passkey")
    return asking("passkey", wanted, groups, lambda task: metrics.first_word, report)


def lines_suite(wanted: Wanted) -> Suite:
    groups = partial(
        lines.groups, files=wanted.files, limit=wanted.limit, documents=wanted.documents, seed=wanted.seed
    )
    report = partial(retrieval_report, suite="lines")
    return asking("lines", wanted, groups, lambda task: metrics.line_number, report)


def kv_suite(wanted: Wanted) -> Suite:
    groups = partial(
        key_values.groups,
        files=wanted.files,
        limit=wanted.limit,
        documents=wanted.documents,
        seed=wanted.seed,
    )
    report = partial(retrieval_report, suite="kv")
    return asking("kv", wanted, groups, lambda task: metrics.contains, report)


def bits_suite(wanted: Wanted) -> Suite:
    text = shipped_prose() if wanted.text is None else read_text(str(wanted.text))
    groups = partial(bits.groups, text=text, pieces=wanted.documents, scored=wanted.tokens)
    return Suite("bits", groups, bits.measure, bits.report, {})


def attention_suite(wanted: Wanted) -> Suite:
    """On the same text as bits, run without a CUDA graph, which could not be watched."""
    text = shipped_prose() if wanted.text is None else read_text(str(wanted.text))
    groups = partial(bits.groups, text=text, pieces=wanted.documents, scored=wanted.tokens)
    engine = (("cuda_graph", False),)
    return Suite(
        "attention", groups, attention.measure, attention.report, {}, engine=engine, against_dense=False
    )


def longbench_suite(wanted: Wanted) -> Suite:
    groups = partial(longbench.groups, files=wanted.files, limit=wanted.limit)
    report = partial(task_report, suite="longbench", right=None)
    return asking("longbench", wanted, groups, longbench.metric_of, report)


def ruler_suite(wanted: Wanted) -> Suite:
    tasks = words(wanted.tasks, "--tasks")
    unknown = [task for task in tasks if task not in ruler.TASKS]
    if unknown:
        raise UserError(f"--tasks: there is no task {unknown[0]!r}; choose from {', '.join(ruler.TASKS)}")
    prose = None if wanted.text is None else read_text(str(wanted.text))
    groups = partial(ruler.groups, tasks=tasks, documents=wanted.documents, seed=wanted.seed, prose=prose)
    report = partial(task_report, suite="ruler", right=1.0)
    return asking("ruler", wanted, groups, lambda task: metrics.found, report)


def retrieval_report(rows: list[Row], out: Path, suite: str) -> Report:
    """Right or wrong by depth and length."""
    found = summarise(rows, right=1.0)
    return Report(found, table(found, f"{suite}: % right"), depth_maps(rows, out, suite))


def task_report(rows: list[Row], out: Path, suite: str, right: float | None) -> Report:
    """Scores by task, and their average."""
    found = with_averages(summarise(rows, right))
    return Report(found, table(found, f"{suite}: scores in %"), score_bars(rows, out, suite))
