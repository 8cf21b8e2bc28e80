"""A text to calibrate on that has things to look up: prose, pass keys and lines in turn, asked and answered.

    python -m bench.lookup_text --prose war_and_peace.txt --out lookups.txt
    ds-offload calibrate --text lookups.txt --method learned --channels 16 --out labels16.safetensors

Prose alone hardly uses what a model looks up numbers with: calibrated on a novel, labels of 16 numbers find
0.85 of the attention mass of pass-key questions in the layer of tiny-256k that answers them, on such a text
0.98. Documents are those of the suites passkey and lines of `ds-offload eval`, of seeds that it never uses.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from offload_runtime.bench.machine import ROOT
from offload_runtime.evals import lines, passkey
from offload_runtime.evals.cases import Group, Tokens
from offload_runtime.loading import load_tokenizer

EMBEDDED = ROOT / "offload_runtime" / "data" / "tiny-256k"
DEPTHS = [(step + 0.5) / 8 for step in range(8)]


def asked(tokens: Tokens, group: Group, answer: str) -> str:
    """A group's document, then each of its questions with its answer."""
    parts = [tokens.text(group.prefix)]
    for case in group.cases:
        name = case.name.rsplit("line ", 1)[-1]
        parts.append(tokens.text(case.ids) + answer.format(name=name, gold=case.gold[0]))
    return "".join(parts)


def lookup_text(tokenizer: Any, prose: str, documents: int, ctx: int, seed: str) -> str:
    """`documents` of some ctx tokens each."""
    tokens, made = Tokens(tokenizer), []
    for index in range(documents):
        draw = random.Random(f"{seed} {index}")
        start = len(prose) * index // documents
        piece = prose[start : start + len(prose) // documents]
        if index % 3 == 0:
            made.append(tokens.text(tokens.rest(piece)[:ctx]))
        elif index % 3 == 1:
            made.append(
                asked(tokens, passkey.one_group(tokens, ctx, DEPTHS, draw, str(index), piece), " {gold}.")
            )
        else:
            answer = "line {name}: REGISTER_CONTENT is <{gold}>\n"
            made.append(asked(tokens, lines.made_group(tokens, ctx, draw, index), answer))
    return "\n\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prose", type=Path, required=True, help="a UTF-8 text of some 500 KB")
    parser.add_argument("--model", default=str(EMBEDDED), help="whose tokenizer counts")
    parser.add_argument("--documents", type=int, default=15)
    parser.add_argument("--ctx", type=int, default=3072, help="tokens of a document")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prose = options.prose.read_text(encoding="utf-8")
    tokenizer = load_tokenizer(options.model)
    text = lookup_text(tokenizer, prose, options.documents, options.ctx, "calibration")
    options.out.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}: {len(text)} characters")


if __name__ == "__main__":
    main()
