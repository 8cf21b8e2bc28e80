"""Evaluation: the grid and its results file, metrics by hand, and every suite at toy size."""

import ast
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from offload_runtime import OffloadedModel
from offload_runtime.calibration import Calibration
from offload_runtime.cli import app
from offload_runtime.demo import shipped_prose
from offload_runtime.errors import UserError
from offload_runtime.evals import bits, key_values, lines, longbench, metrics, ruler
from offload_runtime.evals.attention import LayerWatch
from offload_runtime.evals.cases import Tokens, cut_middle
from offload_runtime.evals.grid import DENSE, Setting, make_grid
from offload_runtime.evals.records import Results
from offload_runtime.evals.summary import summarise

pytest.importorskip("matplotlib")
PACKAGE = Path(__file__).resolve().parent.parent / "offload_runtime"


def evaluate(*arguments: str | Path):
    return CliRunner().invoke(app, ["eval", *map(str, arguments), "--device", "cpu"])


class ByteTokenizer:
    """One byte, one token, 256 in front: the embedded model's, without loading it."""

    def __call__(self, text, add_special_tokens=True, **_):
        ids = ([256] if add_special_tokens else []) + list(text.encode())
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, ids, **_):
        return bytes(i for i in ids.tolist() if i < 256).decode()


@pytest.fixture(scope="module")
def passkey_run(tmp_path_factory):
    """A finished grid of two budgets (one of them dense) and two depths."""
    out = tmp_path_factory.mktemp("evals")
    arguments = ["passkey", "--ctx", "1024", "--depths", "0.2,0.8", "--budget", "64", "--out", out]
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    return out, arguments


def count_calls(monkeypatch) -> list[int]:
    calls = []
    plain = OffloadedModel.generate

    def counted(self, *arguments, **keywords):
        calls.append(1)
        return plain(self, *arguments, **keywords)

    monkeypatch.setattr(OffloadedModel, "generate", counted)
    return calls


def test_passkey_grid_and_its_files(passkey_run):
    out, _ = passkey_run
    rows = [json.loads(line) for line in (out / "passkey.jsonl").read_text().splitlines()]
    assert {(row["budget"], row["depth"]) for row in rows} == {
        (b, d) for b in ("1/1", "64") for d in (0.2, 0.8)
    }
    assert all(row["score"] == 1.0 for row in rows)  # the embedded model finds keys in a thousand tokens
    assert (out / "passkey-tiny-256k.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "passkey.json").read_text())["lines"]
    assert [line["cases"] for line in summary] == [2, 2]


def test_a_finished_grid_is_not_computed_again(passkey_run, monkeypatch):
    out, arguments = passkey_run
    before = (out / "passkey.jsonl").read_bytes()
    calls = count_calls(monkeypatch)
    assert evaluate(*arguments).exit_code == 0
    assert not calls
    assert (out / "passkey.jsonl").read_bytes() == before


def test_a_torn_line_is_cut_and_only_its_cell_computed(passkey_run, monkeypatch):
    out, arguments = passkey_run
    file = out / "passkey.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-25])
    calls = count_calls(monkeypatch)
    assert evaluate(*arguments).exit_code == 0
    assert len(calls) == 1
    *same, last = file.read_bytes().splitlines()
    assert same == whole.splitlines()[:-1]
    assert json.loads(last)["key"] == json.loads(whole.splitlines()[-1])["key"]


def test_results_of_other_label_maps_are_not_taken(passkey_run, monkeypatch, tmp_path):
    _, arguments = passkey_run
    own = Calibration.load(PACKAGE / "data" / "tiny-256k" / "calibration.safetensors")
    other = tmp_path / "other.safetensors"
    replace(own, key_mean=own.key_mean + 1).save(other)
    calls = count_calls(monkeypatch)
    result = evaluate(*arguments, "--calibration", other)
    assert result.exit_code == 0, result.output
    assert len(calls) == 4  # every cell again, dense too: its row says which maps were at hand


def test_damaged_results_are_refused(tmp_path):
    file = tmp_path / "passkey.jsonl"
    file.write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(UserError, match="line 2"):
        Results(file)
    assert file.read_text().count("\n") == 3  # and left as they are


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuite"], "passkey"),
        (["lines", "--file", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["passkey", "--budget", "half"], "half"),
        (["passkey", "--channels", "4000"], "4000"),
        (["passkey", "--label-bits", "4,5"], "5"),
        (["passkey", "--ctx", "10"], "too short"),
        (["passkey", "--ctx", ","], "--ctx"),
        (["passkey", "--depths", "2"], "--depths"),
        (["passkey", "--prefetch", "maybe"], "maybe"),
        (["passkey", "--new-rows", "some"], "new_rows"),
        (["passkey", "--model", "/nowhere"], "/nowhere"),
        (["passkey", "--calibrate-on", "/nowhere.txt"], "/nowhere.txt"),
        (["passkey", "--calibration", "/nowhere.safetensors"], "/nowhere.safetensors"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, arguments, words):
    result = evaluate(*arguments, "--out", tmp_path)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_grid():
    grid = make_grid("1/16,64,1/1", "16,32", "4", "off")
    assert grid[0] == DENSE
    assert grid[1:] == [Setting(b, r, 4, "off") for b in ("1/16", "64") for r in (16, 32)]
    both = make_grid("1/16", None, "4", "off", "none,1/8")
    assert [setting.label for setting in both[1:]] == [
        "1/16, default R, 4 bit, off, exact",
        "1/16, default R, 4 bit, off, 1/8 new",
    ]


def test_metrics_by_hand():
    # given {cat, sat} and right {cat, sat, down}: precision 2/2, recall 2/3, F1 = 4/5
    assert metrics.f1("The cat, sat.", ["a dog", "cat sat down"]) == pytest.approx(0.8)
    assert metrics.f1("dog", ["cat"]) == 0
    assert metrics.classification("\nIt is Sport.\nor politics", ["sport"]) == 1
    assert metrics.classification("no\nsport", ["sport"]) == 0
    assert metrics.retrieval("Paragraph 7, or Paragraph 8", ["Paragraph 7"]) == 0.5
    assert metrics.count("17 of 17 but 4", ["17"]) == pytest.approx(2 / 3)
    assert metrics.count("none", ["17"]) == 0
    assert metrics.first_word(" 48213.", ["48213"]) == 1
    assert metrics.line_number("line 12: REGISTER_CONTENT is <2416> and 7", ["2416"]) == 1
    assert metrics.line_number("I think 3, no 2416", ["2416"]) == 1
    assert metrics.line_number("2416, no 3", ["2416"]) == 0
    assert metrics.found("x is 12, y is 13", ["12", "13", "14"]) == pytest.approx(2 / 3)


def test_rouge_l_by_hand():
    pytest.importorskip("rouge_score", reason="needs rouge-score (the extra eval)")
    # longest common subsequence "a c d": precision 3/4, recall 3/3
    assert metrics.rouge_l("a b c d", ["a c d"]) == pytest.approx(6 / 7)


def test_summary_counts_what_dense_gets_wrong():
    base = {"model": "m", "ctx": 9, "task": "t", "channels": None, "bits": 4}
    dense = [{**base, **point, "case": c, "score": s} for c, s in (("a", 1.0), ("b", 0.0))
             for point in [{"budget": "1/1", "prefetch": "off"}]]  # fmt: skip
    sparse = [
        {**base, "budget": "8", "prefetch": "off", "case": c, "score": s} for c, s in (("a", 0.0), ("b", 1.0))
    ]
    line = summarise(dense + sparse, right=1.0)[1]
    assert (line["score"], line["dense"], line["dense_wrong"], line["kept"]) == (0.5, 0.5, 1, 0.0)


def test_cases_fit_their_length_and_hold_their_answer():
    tokens = Tokens(ByteTokenizer())
    for groups in (lines.groups(tokens, 3000, (), 1, 2, 0), key_values.groups(tokens, 3000, (), 1, 2, 0)):
        assert len(groups) == 2
        for group in groups:
            assert 2800 < group.tokens <= 3000
            text = tokens.text(group.prefix)
            for case in group.cases:
                assert text.count(case.gold[0]) >= 1
                assert case.facts["depth"] == pytest.approx(
                    text.index(case.gold[0]) / len(text), abs=0.25
                )  # a header in front


def test_files_of_cases(tmp_path):
    tokens = Tokens(ByteTokenizer())
    file = tmp_path / "lines.jsonl"
    prompt = "Header\n\nline a-b: REGISTER_CONTENT is <17>\n\nNow the record is over. Which is in line a-b?"
    file.write_text(json.dumps({"prompt": prompt, "expected_number": 17}) + "\n")
    (group,) = lines.groups(tokens, 1000, [file], 5, 1, 0)
    assert tokens.text(torch.cat([group.prefix, group.cases[0].ids])) == prompt
    assert not lines.groups(tokens, 50, [file], 5, 1, 0)  # too long for 50 tokens
    file.write_text("{}\n")
    with pytest.raises(UserError, match="prompt"):
        lines.groups(tokens, 1000, [file], 5, 1, 0)
    file.write_text("not json\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        lines.groups(tokens, 1000, [file], 5, 1, 0)


def test_cut_in_the_middle():
    assert cut_middle(torch.arange(10), 5).tolist() == [0, 1, 7, 8, 9]
    assert cut_middle(torch.arange(3), 5).tolist() == [0, 1, 2]


def test_only_the_command_imports_evals():
    users = set()
    for file in PACKAGE.glob("*.py"):
        names = {
            node.module or ""
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        if any("evals" in name.split(".") for name in names):
            users.add(file.name)
    assert users == {"cli_eval.py", "cli_eval_command.py"}


def test_bits_of_dense_equal_transformers_loss(tmp_path):
    """Teacher-forced decode steps at full budget against one forward pass of transformers."""
    embedded = PACKAGE / "data" / "tiny-256k"
    model = OffloadedModel.from_pretrained(embedded, device="cpu", ctx=400, budget="1/1", prefetch="off")
    (group,) = bits.groups(Tokens(model.tokenizer), 400, shipped_prose(), 1, 24)
    assert group.tokens == 400
    (case,) = group.cases
    ((_, got),) = bits.measure(model, group, [case])
    ids = torch.cat([group.prefix, case.ids])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
        logprobs = plain(ids[None]).logits[0].log_softmax(-1)
    expected = -logprobs[-25:-1].gather(1, ids[-24:, None]).sum()
    assert got["tokens"] == got["bytes"] == 24
    assert got["nats"] == pytest.approx(float(expected), rel=1e-3)
    assert got["bits_per_byte"] == pytest.approx(float(expected) / 24 / 0.6931471805599453, rel=1e-3)


def test_bits_command(tmp_path):
    arguments = ["bits", "--ctx", "600", "--tokens", "8", "--budget", "1/16,64", "--label-bits", "4"]
    result = evaluate(*arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    dense, *sparse = json.loads((tmp_path / "bits.json").read_text())["lines"]
    assert dense["more"] == 0
    assert 0 < dense["bits_per_byte"] < 8
    assert all(line["bits_per_byte"] != dense["bits_per_byte"] for line in sparse)  # the budget was used
    assert (tmp_path / "bits-tiny-256k-600.png").exists()


def test_longbench_files(tmp_path):
    tokens, file = Tokens(ByteTokenizer()), tmp_path / "qa.jsonl"
    row = {"task": "musique", "prompt": "x" * 100 + "Answer:", "gold": ["UT", "Texas"]}
    file.write_text(json.dumps(row) + "\n")
    (group,) = longbench.groups(tokens, 64, [file], 9)
    assert (group.tokens, group.cases[0].gold) == (64, ("UT", "Texas"))
    assert tokens.text(group.cases[0].ids).endswith("Answer:")
    assert longbench.metric_of("musique")("in Texas", ["UT", "Texas"]) == pytest.approx(2 / 3)
    assert longbench.metric_of("trec")("no\nsport", ["sport"]) == 0
    file.write_text(json.dumps({**row, "task": "poetry"}) + "\n")
    with pytest.raises(UserError, match="poetry"):
        longbench.groups(tokens, 64, [file], 9)
    with pytest.raises(UserError, match="--file"):
        longbench.groups(tokens, 64, [], 9)


def test_ruler_cases():
    tokens = Tokens(ByteTokenizer())
    made = {group.task: group for group in ruler.groups(tokens, 9000, ruler.TASKS, 1, 0, None)}
    for group in made.values():
        text = tokens.text(group.prefix)
        assert 8500 < group.tokens < 9100
        assert all(gold in text for gold in group.cases[0].gold)
    chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", tokens.text(made["variables"].prefix))
    assert [name for name, _ in chain] == list(made["variables"].cases[0].gold)
    assert [source for _, source in chain[1:]] == [name for name, _ in chain[:-1]]
    counts = Counter(re.findall(r"\d+\. (\w+)", tokens.text(made["words"].prefix)))
    assert {word for word, n in counts.items() if n == 30} == set(made["words"].cases[0].gold)
    assert set(counts.values()) == {3, 30}
    again = ruler.groups(tokens, 9000, ["variables"], 1, 0, None)[0]
    assert torch.equal(again.prefix, made["variables"].prefix)


def test_attention_command(tmp_path):
    arguments = ["attention", "--ctx", "600", "--tokens", "4", "--budget", "1/16,1/4", "--out", tmp_path]
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    few, many = json.loads((tmp_path / "attention.json").read_text())["lines"]
    for line in (few, many):
        assert line["attended"] <= line["oracle"] + 1e-6  # nothing beats the exact top-k
        assert 0 < line["recall"] < 1
        assert 0 < line["overlap"] < 1
        assert 0 < line["prefetch_recall"] < 1
        assert line["layers"][0]["prefetch_recall"] is None  # nothing predicts layer 0
    assert few["oracle"] < many["oracle"] < 1
    assert few["attended"] < many["attended"]
    assert (tmp_path / "attention-tiny-256k-600.png").exists()


def test_watching_attention_by_hand():
    """One layer watch on tensors small enough to count."""
    state = SimpleNamespace(lengths=torch.tensor([6]))
    resident = SimpleNamespace(sinks=1, recent=2)
    keys = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0, 0.0])[:, None]  # logits, for a query of 1
    rows = torch.cat([keys, torch.zeros(6, 1)], 1)[None, None]  # [1, 1, 6, 2]
    cache = SimpleNamespace(state=state, resident=resident, host=SimpleNamespace(link_rows=rows))
    chosen = torch.tensor([[[1, 2]]])  # the best are 1 and 3
    selection = SimpleNamespace(tokens=chosen, counts=torch.tensor([[2]]))
    watch = LayerWatch()
    watch.look(cache, torch.ones(1, 1, 1), selection, 1.0)
    e = [math.exp(value) for value in keys.flatten().tolist()]
    assert watch.means()["oracle"] == pytest.approx((e[0] + e[1] + e[3] + e[4] + e[5]) / sum(e))
    assert watch.means()["attended"] == pytest.approx((e[0] + e[1] + e[2] + e[4] + e[5]) / sum(e))
    assert watch.means()["recall"] == 0.5


def test_watching_kv_heads_with_unequal_budgets():
    """The second head selects one token, the first three: -1 past its count is no token."""
    keys = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.5, 0.0, 0.0])[:, None]  # logits, for a query of 1
    rows = torch.cat([keys, torch.zeros(7, 1)], 1).expand(1, 2, 7, 2)
    cache = SimpleNamespace(
        state=SimpleNamespace(lengths=torch.tensor([7])),
        resident=SimpleNamespace(sinks=1, recent=2),
        host=SimpleNamespace(link_rows=rows),
    )
    chosen = torch.tensor([[[1, 2, 3], [3, -1, -1]]])
    selection = SimpleNamespace(tokens=chosen, counts=torch.tensor([[3, 1]]))
    watch = LayerWatch()
    watch.look(cache, torch.ones(1, 2, 1), selection, 1.0)
    e = [math.exp(value) for value in keys.flatten().tolist()]
    fixed, total = e[0] + e[5] + e[6], sum(e)
    oracle = (fixed + e[1] + e[2] + e[3]) / total + (fixed + e[1]) / total
    assert watch.means()["oracle"] == pytest.approx(oracle / 2)
    attended = (fixed + e[1] + e[2] + e[3]) / total + (fixed + e[3]) / total
    assert watch.means()["attended"] == pytest.approx(attended / 2)
    assert watch.means()["recall"] == 0.75  # three of the four best


def test_decoding_the_question_too(tmp_path):
    """The question then runs through decode steps: fewer prompt tokens, the same answers at full budget."""
    common = ["passkey", "--ctx", "1024", "--depths", "0.2,0.8", "--budget", "1/1", "--out"]
    result = evaluate(*common, tmp_path, "--decode-question")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "passkey.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1.0, 1.0]
    assert len({row["prompt_tokens"] for row in rows}) == 1  # the document alone, whatever the question
    assert all(row["new_tokens"] > 12 for row in rows)
