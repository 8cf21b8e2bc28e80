"""`ds-offload generate`: check everything, then load, stream, and say what it cost."""

import codecs
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from .calibration import Calibration
from .calibration_file import with_choice
from .cli_exits import warn
from .cli_model import config_of, fitted_plan, load
from .cli_progress import Working, quiet_unless_terminal
from .cli_stats import check_stats_choice, figures, print_stats
from .config import RuntimeConfig, make_config
from .engine import OffloadedModel, choose_device
from .errors import UserError
from .fitting import shrunk
from .json_file import write_json
from .loading import load_tokenizer
from .model_check import check_config, check_label_channels
from .model_source import ModelSource
from .planner import Plan, require
from .snapshot import Snapshot, check_target


@dataclass(frozen=True)
class GenerateRequest:
    """What the command line asked for."""

    source: ModelSource
    settings: dict[str, Any]
    prompt: str | None
    prompt_file: str | None
    max_new_tokens: int
    chat: bool
    sampling: dict[str, Any]
    stats: str
    stats_file: Path | None
    save_cache: Path | None = None
    load_cache: Path | None = None


def run_generate(request: GenerateRequest) -> None:
    """Generate to stdout. All checks come before the weights load; RunError or UserError in one line."""
    source = request.source
    config = make_config(with_choice(request.settings, source.name_or_path, source.rope_scaling))
    if request.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {request.max_new_tokens}; it must be at least 1")
    check_stats_choice(request.stats, request.stats_file)
    check_file(config.calibration, "--calibration")
    if request.save_cache is not None:
        check_target(request.save_cache)
    text = read_prompt(request.prompt, request.prompt_file)
    place = choose_device(request.source.device)
    model_config = config_of(request.source)
    check_label_channels(config.label_channels, check_config(model_config))
    if config.calibration is not None:
        Calibration.load(Path(config.calibration)).check(model_config)
    if request.load_cache is not None:
        Snapshot.open(request.load_cache).check_config(model_config)
    tokenizer = load_tokenizer(request.source.name_or_path, **request.source.hub())
    ids = tokenise(tokenizer, text, request.chat)
    tokens = ids.shape[1] + request.max_new_tokens
    check_length(ids.shape[1], request.max_new_tokens, config)
    config, plan = fitted_plan(request.source, config, model_config, place, tokens)
    request = replace(request, settings={**request.settings, **shrunk(config)})
    require(plan)
    generate(request, ids, plan)


def generate(request: GenerateRequest, ids: Any, plan: Plan) -> None:
    """Load the model, stream the answer to [1, T] ids to stdout, report."""
    source = request.source
    console = Console(stderr=True)
    console.print(f"loading {Path(source.name_or_path).name}", style="dim", highlight=False)
    quiet_unless_terminal()
    model = load(source, request.settings)
    try:
        loaded = 0
        if request.load_cache is not None:
            console.print(f"loading cache {request.load_cache}", style="dim", highlight=False)
            loaded = model.load_cache(request.load_cache, room_after(request, ids))
        with Working(console, f"prefill of {ids.shape[1]} tokens") as bar:
            streamer = PipeStreamer(model.tokenizer, bar.finish)
            model.generate(
                ids.to(model.model.device),
                max_new_tokens=request.max_new_tokens,
                streamer=streamer,
                on_prefill=bar.update,
                resume=request.load_cache is not None,
                **request.sampling,
            )
        report_cache(request, model, loaded)
        result = figures(model.stats, plan)
    finally:
        model.close()
    if request.stats_file is not None:
        write_json(request.stats_file, result, f"--stats-file {request.stats_file}")
    print_stats(result, request.stats, console)


def room_after(request: GenerateRequest, ids: Any) -> int:
    """Tokens that the prompt [1, T] and its answer may add to the saved ones, at least the answer's."""
    saved = Snapshot.open(request.load_cache).tokens if request.load_cache is not None else 0
    return max(ids.shape[1] - saved, 0) + request.max_new_tokens


def report_cache(request: GenerateRequest, model: OffloadedModel, loaded: int) -> None:
    """Warn of a cache that was little use and of what was shrunk after loading; save the cache."""
    reused = model.stats["reused_tokens"]
    if 2 * reused < loaded:
        warn(f"only {reused} of the {loaded} tokens in {request.load_cache} begin this prompt")
    for note in model.stats["fitted"]:
        warn(note)
    if request.save_cache is not None:
        model.save_cache(request.save_cache)


class PipeStreamer(TextStreamer):
    """Streams text to stdout, ends it with a newline, and closes the progress bar before the first word."""

    def __init__(self, tokenizer: Any, before_text: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.before_text = before_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.before_text()
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text from an option, a file or stdin ('-'); UserError when there is none."""
    if prompt is not None and prompt_file is not None:
        raise UserError("give the prompt once: --prompt, --prompt-file or -")
    if prompt is None and prompt_file is None:
        raise UserError("there is no prompt; give --prompt TEXT, --prompt-file FILE, or - to read stdin")
    text = prompt if prompt is not None else read_text(str(prompt_file))
    if not text.strip():
        raise UserError("the prompt is empty")
    return text


def read_text(name: str) -> str:
    """A UTF-8 text file, or stdin for '-'."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error


def check_file(name: str | None, option: str) -> None:
    if name is not None and not Path(name).is_file():
        raise UserError(f"{option}: there is no file {name}")


def tokenise(tokenizer: Any, text: str, chat: bool) -> Any:
    """Token ids [1, T] of the prompt, as a user's message in a chat if wanted."""
    if not chat:
        return tokenizer(text, return_tensors="pt").input_ids
    if not tokenizer.chat_template:
        raise UserError("this model has no chat template; leave --chat out")
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def check_length(prompt_tokens: int, new_tokens: int, config: RuntimeConfig) -> None:
    if prompt_tokens + new_tokens > config.ctx:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens and with {new_tokens} new ones does not fit into "
            f"--ctx {config.ctx}; raise --ctx or shorten the prompt"
        )
