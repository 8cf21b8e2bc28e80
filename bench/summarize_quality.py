"""ROUGE of offloaded and dense summaries against the references of LongBench files {task, prompt, gold}.

    python -m bench.summarize_quality --model DIR --data gov_report.jsonl --limit 12 --budget 1/16 \
        --out bench/results/summaries_gov_report.json

Both decode the same prompt greedily with the same weights: "dense" is
transformers' own generate, "offloaded" goes through the offloaded cache. A
prompt that is too long loses its middle, as LongBench does it, so that the
question at its end stays. Needs the extra `eval` (rouge-score). The report is written after every case.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer

from offload_runtime.bench.machine import machine
from offload_runtime.engine import OffloadedModel
from offload_runtime.jobs.model_answers import ModelAnswerer
from offload_runtime.jobs.splitting import shorten

KINDS = ["rouge1", "rouge2", "rougeL"]


def rouge(references: list[str], text: str) -> dict[str, float]:
    """F1 in percent, the best over the references."""
    scorer = RougeScorer(KINDS, use_stemmer=True)
    scores = [scorer.score(reference, text) for reference in references]
    return {kind: round(100 * max(score[kind].fmeasure for score in scores), 2) for kind in KINDS}


def dense_text(model: OffloadedModel, ids: list[int], max_new_tokens: int) -> str:
    """What transformers' generate says to the same tokens."""
    prompt = torch.tensor([ids], device=model.model.device)  # [1, T]
    with torch.no_grad():
        out = model.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return str(model.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()


def compare(
    model: OffloadedModel, answerer: ModelAnswerer, case: dict[str, Any], room: int, max_new_tokens: int
) -> dict[str, Any]:
    """One line: both texts, their scores, and how close they are to each other."""
    full = answerer.count(case["prompt"])
    prompt = case["prompt"] if full <= room else shorten(case["prompt"], "middle", answerer.count, room)
    offloaded = answerer.answer([prompt], max_new_tokens, lambda stage, done, total: None)[0]
    answerer.release()  # the caches' memory goes to the dense run
    dense = dense_text(model, answerer.encode(prompt), max_new_tokens)
    references = case["gold"] if isinstance(case["gold"], list) else [case["gold"]]
    return {
        "prompt_tokens": offloaded.prompt_tokens,
        "full_prompt_tokens": full,
        "new_tokens": offloaded.new_tokens,
        "offloaded": rouge(references, offloaded.text),
        "dense": rouge(references, dense),
        "offloaded_against_dense": rouge([dense], offloaded.text),
        "same_text": offloaded.text == dense,
        "hit_rate": offloaded.hit_rate,
        "ttft_s": offloaded.ttft_s,
        "tpot_s": offloaded.tpot_s,
        "offloaded_text": offloaded.text,
        "dense_text": dense,
    }


def means(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean scores over the cases, and the mean difference of offloaded and dense with its standard error."""
    result: dict[str, Any] = {"cases": len(lines), "same_text": sum(line["same_text"] for line in lines)}
    for name in ("offloaded", "dense", "offloaded_against_dense"):
        result[name] = {kind: round(statistics.mean(line[name][kind] for line in lines), 2) for kind in KINDS}
    for kind in KINDS:
        gaps = [line["offloaded"][kind] - line["dense"][kind] for line in lines]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
        result[f"{kind}_difference"] = {
            "mean": round(statistics.mean(gaps), 2),
            "standard_error": None if error is None else round(error, 2),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="cases to take from the start of the file")
    parser.add_argument(
        "--ctx", type=int, default=8192, help="prompt and answer; the model's own limit at most"
    )
    parser.add_argument("--budget", default="1/16")
    parser.add_argument("--calibration", help="its label maps; else every prompt calibrates the model")
    parser.add_argument("--prefetch", default="correct")
    parser.add_argument("--new-rows", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--no-chat", action="store_true", help="do not use the model's chat template")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()][
        : options.limit
    ]
    settings = {"budget": options.budget, "prefetch": options.prefetch, "new_rows": options.new_rows}
    model = OffloadedModel.from_pretrained(
        options.model, device=options.device, ctx=options.ctx, calibration=options.calibration, **settings
    )
    chat = bool(model.tokenizer.chat_template) and not options.no_chat
    answerer = ModelAnswerer(model, chat)
    report = {
        "data": options.data.name,
        "model": Path(options.model).name,
        "calibration": None if options.calibration is None else Path(options.calibration).name,
        "ctx": options.ctx,
        "max_new_tokens": options.max_new_tokens,
        "chat": chat,
        **settings,
        "machine": machine(),
    }
    lines = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        room = options.ctx - options.max_new_tokens
        lines.append(compare(model, answerer, case, room, options.max_new_tokens))
        print(json.dumps({k: v for k, v in lines[-1].items() if not k.endswith("_text")}), flush=True)
        text = json.dumps(report | {"means": means(lines), "lines": lines}, indent=1, ensure_ascii=False)
        options.out.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(means(lines)))


if __name__ == "__main__":
    main()
