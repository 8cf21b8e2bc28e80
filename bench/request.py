"""What `ds-offload bench` was asked for: comma-separated text checked and turned into lists."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_runtime.bench.shapes import check_shape
from offload_runtime.config import RuntimeConfig
from offload_runtime.errors import UserError

BASELINES = ("dense", "streaming", "hf-dense", "hf-offloaded")
SMALLEST_CTX = 256  # tokens: sinks, recent ones, and something to select from
DEFAULTS: dict[str, Any] = {
    "shape": "llama-3.1-8b",
    "ctx": "262144",
    "budget": "2048,1/16",
    "batch": "1",
    "prefetch": "correct,predict,off",
    "new_rows": "2048",
    "resident": "on,off",
    "locality": "no,measured",
    "baselines": ",".join(BASELINES),
    "steps": 50,
}
# Seconds on two CPU cores.
QUICK = {**DEFAULTS, "shape": "tiny", "ctx": "1024", "budget": "128", "new_rows": "16", "steps": 3}


@dataclass(frozen=True)
class Setting:
    """One session of ours: what of it differs from RuntimeConfig's defaults."""

    budget: str
    prefetch: str
    new_rows: int | None

    def config(self, ctx: int) -> RuntimeConfig:
        return RuntimeConfig(ctx=ctx, budget=self.budget, prefetch=self.prefetch, new_rows=self.new_rows)


@dataclass(frozen=True)
class Request:
    """Everything checked. sticky: the --new-rows list, as counts or parts of the budget."""

    shapes: list[str]
    ctxs: list[int]
    batches: list[int]
    budgets: list[str]
    modes: list[str]
    sticky: list[str]
    resident: list[str]
    localities: list[str]
    baselines: list[str]
    steps: int
    models: list[str | None]
    text: Path | None
    device: str

    def settings(self, ctx: int) -> list[Setting]:
        """Exact selection of every budget and mode, then sticky selection where it bounds something."""
        found = []
        for budget in self.budgets:
            found += [Setting(budget, mode, None) for mode in self.modes]
            tokens = RuntimeConfig(ctx=ctx, budget=budget).budget_tokens(ctx)
            sticky = [RuntimeConfig(ctx=ctx, budget=budget, new_rows=text) for text in self.sticky]
            counts = [count for config in sticky if (count := config.entering(tokens)) is not None]
            found += [Setting(budget, mode, count) for count in counts for mode in self.modes]
        return found

    def shares(self) -> list[float]:
        """Every budget as a part of its context."""
        found = {
            RuntimeConfig(ctx=ctx, budget=budget).budget_tokens(ctx) / ctx
            for ctx in self.ctxs for budget in self.budgets
        }  # fmt: skip
        return sorted(found)


def make_request(given: dict[str, Any], quick: bool, device: str) -> Request:
    """From the command's options, None where the user gave none; UserError in one line."""
    options = {
        name: default if given.get(name) is None else given[name]
        for name, default in (QUICK if quick else DEFAULTS).items()
    }
    text, models = given.get("text"), given.get("locality_model") or []
    request = Request(
        shapes=words(options["shape"], "--shape"),
        ctxs=numbers(options["ctx"], "--ctx", SMALLEST_CTX),
        batches=numbers(options["batch"], "--batch", 1),
        budgets=words(options["budget"], "--budget"),
        modes=words(options["prefetch"], "--prefetch"),
        sticky=[word for word in words(options["new_rows"], "--new-rows") if word != "none"],
        resident=chosen(options["resident"], "--resident", ("on", "off")),
        localities=chosen(options["locality"], "--locality", ("no", "measured")),
        baselines=[
            word
            for word in chosen(options["baselines"], "--baselines", (*BASELINES, "none"))
            if word != "none"
        ],
        steps=numbers(str(options["steps"]), "--steps", 1)[0],
        models=[None, *models],
        text=text,
        device=device,
    )
    for shape in request.shapes:
        check_shape(shape)
    for ctx in request.ctxs:
        for setting in request.settings(ctx):
            setting.config(ctx)
        if 4 * request.steps > ctx:
            raise UserError(f"--steps {request.steps} is too many for --ctx {ctx}; at most a quarter of it")
    if text is not None and not text.is_file():
        raise UserError(f"--text {text} is not a file")
    for model in models:
        if not Path(model).is_dir():
            raise UserError(f"--locality-model {model} is not a directory")
    return request


def words(text: str, option: str) -> list[str]:
    """The parts of a comma-separated list, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{option} {text!r} has an empty part; separate values by single commas")
    return list(dict.fromkeys(parts))


def chosen(text: str, option: str, known: tuple[str, ...]) -> list[str]:
    """words() of which each is known."""
    for word in words(text, option):
        if word not in known:
            raise UserError(f"{option} {word!r} is unknown; choose from {', '.join(known)}")
    return words(text, option)


def numbers(text: str, option: str, least: int) -> list[int]:
    """A comma-separated list of whole numbers, none below `least`."""
    found = []
    for word in words(text, option):
        try:
            number = int(word)
        except ValueError:
            raise UserError(f"{option} {word!r} is not a whole number") from None
        if number < least:
            raise UserError(f"{option} is {number}; it must be at least {least}")
        found.append(number)
    return found
