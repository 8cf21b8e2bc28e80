"""`ds-offload demo`: one pass key in a long text, found through the offloaded cache."""

from pathlib import Path
from typing import Any

from rich.console import Console

from .cli_generate import read_text
from .cli_options import model_or_embedded
from .cli_progress import Working, quiet_unless_terminal
from .cli_stats import figures, summary
from .config import make_config
from .demo import ask, build_document, is_right
from .engine import OffloadedModel, choose_device
from .errors import RunError
from .memory import measure
from .model_check import check_config, load_config, position_warning
from .planner import make_plan, require

ANSWER_TOKENS = 8  # " 48213." and room to see that it stops


def run_demo(
    tokens: int, depth: float, seed: int, prose_file: Path | None, device: str, settings: dict[str, Any]
) -> None:
    """Build the document, ask, judge. RunError when the answer is wrong."""
    console = Console(stderr=True)
    prose = None if prose_file is None else read_text(str(prose_file))
    document = build_document(tokens, depth, seed, prose, lambda text: len(text.encode()))
    source = model_or_embedded(None)
    length = len(document.text.encode()) + 1 + ANSWER_TOKENS  # one byte a token, <bos>
    settings = {"ctx": max(length, 1024), "seed": seed, **settings}
    config, place, model_config = make_config(settings), choose_device(device), load_config(source)
    warning = position_warning(length, check_config(model_config))
    if warning:
        console.print(f"warning: {warning}")
    plan = make_plan(config, model_config, measure(str(place)), place.type, tokens=length)
    require(plan)
    print(f"A document of {length - ANSWER_TOKENS} tokens hides the key of {document.name} at {depth:.0%}.")
    print(f"budget {config.budget} = {plan.budget} of {length} tokens a KV head, on {place}", flush=True)
    quiet_unless_terminal()
    model = OffloadedModel.from_pretrained(source, device=device, **settings)
    try:
        with Working(console, "prefill") as bar:
            answer = ask(model, document, ANSWER_TOKENS, on_prefill=bar.update)
        result = figures(model.stats, plan)
    finally:
        model.close()
    print(f"The pass key for {document.name} is{answer.rstrip()}")
    for line in summary(result):
        print(line)
    if not is_right(answer, document):
        raise RunError(f"wrong: the key is {document.answer}")
    print(f"right: the key is {document.answer}")
