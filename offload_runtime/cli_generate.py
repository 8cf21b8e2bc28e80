"""`ds-offload generate`: check everything, then load, stream, and say what it cost."""

import codecs
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoTokenizer, TextStreamer

from .calibration import Calibration
from .cli_exits import warn
from .cli_options import ModelSource
from .cli_progress import Working, quiet_unless_terminal
from .cli_stats import check_stats_choice, figures, print_stats, write_json
from .config import RuntimeConfig, make_config
from .engine import OffloadedModel, choose_device, with_choice
from .errors import RunError, UserError
from .memory import measure
from .model_check import check_config, check_label_channels, first_line, load_config, position_warning
from .planner import Plan, make_plan, require


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


def run_generate(request: GenerateRequest) -> None:
    """Generate to stdout. All checks come before the weights load; RunError or UserError in one line."""
    config = make_config(with_choice(request.settings, request.source.name_or_path))
    if request.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {request.max_new_tokens}; it must be at least 1")
    check_stats_choice(request.stats, request.stats_file)
    check_file(config.calibration, "--calibration")
    text = read_prompt(request.prompt, request.prompt_file)
    place = choose_device(request.source.device)
    model_config = load_config(request.source.name_or_path, **request.source.hub())
    shape = check_config(model_config)
    check_label_channels(config.label_channels, shape)
    if config.calibration is not None:
        Calibration.load(Path(config.calibration)).check(model_config)
    tokenizer = load_tokenizer(request.source)
    ids = tokenise(tokenizer, text, request.chat)
    tokens = ids.shape[1] + request.max_new_tokens
    check_length(ids.shape[1], request.max_new_tokens, config)
    warning = position_warning(tokens, shape)
    if warning:
        warn(warning)
    plan = make_plan(
        config,
        model_config,
        measure(str(place)),
        place.type,
        tokens=tokens,
        dtype=dtype_of(request.source.dtype),
    )
    require(plan)
    generate(request, ids, plan)


def generate(request: GenerateRequest, ids: Any, plan: Plan) -> None:
    """Load the model, stream the answer to [1, T] ids to stdout, report."""
    source = request.source
    console = Console(stderr=True)
    console.print(f"loading {Path(source.name_or_path).name}", style="dim", highlight=False)
    model = load_model(source, request.settings)
    try:
        with Working(console, f"prefill of {ids.shape[1]} tokens") as bar:
            streamer = PipeStreamer(model.tokenizer, bar.finish)
            model.generate(
                ids.to(model.model.device),
                max_new_tokens=request.max_new_tokens,
                streamer=streamer,
                on_prefill=bar.update,
                **request.sampling,
            )
        result = figures(model.stats, plan)
    finally:
        model.close()
    if request.stats_file is not None:
        write_json(request.stats_file, result)
    print_stats(result, request.stats, console)


def load_model(source: ModelSource, settings: dict[str, Any]) -> OffloadedModel:
    """The model, ready to run; RunError in one line when its files are missing or damaged."""
    quiet_unless_terminal()
    try:
        return OffloadedModel.from_pretrained(
            source.name_or_path, device=source.device, dtype=source.dtype, **source.hub(), **settings
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RunError(f"cannot load model {source.name_or_path}: {first_line(error)}") from error


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


def load_tokenizer(source: ModelSource) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source.name_or_path, **source.hub())
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"model {source.name_or_path} has no usable tokenizer: {reason}") from error


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


def dtype_of(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
