"""What benchmarks that run a model over one document of a text share: options, and the document."""

import argparse
from pathlib import Path

import torch

from offload_runtime.calibration_collect import make_blocks
from offload_runtime.evals.cases import Tokens


def model_parser(description: str | None, tokens: int) -> argparse.ArgumentParser:
    """A command line with the model, the document's length (by default `tokens`), device and result."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model directory or GGUF file")
    parser.add_argument("--tokens", type=int, default=tokens, help="of the document")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def document(tokens: Tokens, file: Path, length: int) -> torch.Tensor:
    """Ids [T] of `length` tokens from a place in a text, or all of it, after what begins a prompt."""
    ids = tokens.rest(file.read_text(encoding="utf-8"))
    (block,) = make_blocks(ids, tokens.prefix(""), length, length, seed=0)
    return block
