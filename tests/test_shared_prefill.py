"""One prefill asked under many budgets answers as a prefill for each budget does."""

import time
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from offload_runtime import OffloadedModel
from offload_runtime.bench.quality_long import label_of
from offload_runtime.bench.quality_longbench import markdown
from offload_runtime.bench.shared_prefill import Job, SharedPrefill, open_runtime, run_job
from offload_runtime.calibration import config_hash
from offload_runtime.evals.cases import Case, Group
from offload_runtime.evals.grid import DENSE, Setting
from offload_runtime.evals.records import Results
from offload_runtime.prefill import PrefillRun

from .models import identity_calibration, logits_of, random_ids, random_llama

SPARSE = Setting("24", 16, 4)
SETTINGS = (DENSE, SPARSE, replace(SPARSE, budget="1/4"))


def group_of(seed=0, prefix=400):
    cases = tuple(Case(f"q{n}", random_ids(5 + n, seed=seed + n + 1)[0]) for n in range(2))
    return Group("toy", prefix + 20, random_ids(prefix, seed=seed)[0], cases, new_tokens=6)


def look(runtime, group, case):
    prompt = torch.cat([group.prefix, case.ids])[None]
    _, logits = logits_of(runtime.generate, prompt, 6, resume=True)
    return {"logits": logits[:, 0].tolist(), "k": runtime.stats["layers"][1]["budgets"]}


def shared_of(model, apart=False):
    facts = {"config_hash": config_hash(model.config)}
    base = OffloadedModel(model, calibration=replace(identity_calibration(model), provenance=facts))
    shared = open_runtime(base, SPARSE, 1000, base.calibration)
    return SharedPrefill(shared.runtime, apart)


def rows_of(shared, tmp_path, groups, name):
    known = Results(tmp_path / f"{name}.jsonl")
    for group in groups:
        assert run_job(Job("s", group, SETTINGS, look, {}), shared, "m", known, time.monotonic() + 1000)
    return known


def test_shared_equals_apart(tmp_path, monkeypatch):
    model = random_llama()
    groups = [group_of(0), group_of(50, prefix=300)]
    prefills = []
    plain = PrefillRun.run
    monkeypatch.setattr(
        PrefillRun, "run", lambda self, ids: (prefills.append(ids.shape[1]), plain(self, ids))[1]
    )
    together = rows_of(shared_of(model), tmp_path, groups, "together")
    assert [n for n in prefills if n > 20] == [400, 300]  # one long prefill a document
    apart = rows_of(shared_of(model, apart=True), tmp_path, groups, "apart")
    assert list(together.rows) == list(apart.rows)
    assert len(together.rows) == 2 * 2 * 3
    for key, row in together.rows.items():
        assert row["k"] == apart.rows[key]["k"]
        got, expected = torch.tensor(row["logits"]), torch.tensor(apart.rows[key]["logits"])  # [6, V]
        # Where two tokens are nearly tied, greedy decoding may part; up to there all must agree.
        parted = (got.argmax(-1) != expected.argmax(-1)).tolist()
        steps = parted.index(True) + 1 if True in parted else len(parted)
        assert steps >= 3
        torch.testing.assert_close(got[:steps], expected[:steps], rtol=1e-3, atol=1e-3)
    dense, few, _ = list(together.rows.values())[:3]
    assert dense["logits"] != few["logits"]


def test_groups_of_any_length_share_caches(tmp_path):
    runtime = shared_of(random_llama()).runtime
    shared, sessions = SharedPrefill(runtime, least=1000), set()
    for group in (group_of(0), group_of(50, prefix=600)):
        shared.hold(group, group.cases[0])
        sessions.add(runtime._session)
    assert len(sessions) == 1
    assert runtime._session.layout.capacity >= 1000


def test_a_table_has_dense_beside_each_budget():
    line = {"task": "qa", "cases": 2, "dense": 0.5}
    lines = [line | {"budget": "1/1", "score": 0.5}, line | {"budget": "1/8", "score": 0.49}]
    assert markdown(lines).splitlines()[2:] == ["| qa | 1/8 | 2 | 50.0 | 49.0 | -1.0 |"]


def test_nothing_is_asked_twice_and_time_ends_it(tmp_path):
    shared = shared_of(random_llama())
    known = rows_of(shared, tmp_path, [group_of()], "rows")

    def never(*_):
        raise AssertionError("asked again")

    assert run_job(Job("s", group_of(), SETTINGS, never, {}), shared, "m", known, time.monotonic() + 1000)
    other = Job("s", group_of(7), SETTINGS, never, {})
    assert not run_job(other, shared, "m", known, time.monotonic() - 1)


@pytest.mark.parametrize("word", ["16x4", "32x16:some/file"])
def test_labels_of_the_command(word):
    setting, file = label_of(word, Namespace(new_rows="1/8", prefetch="predict"))
    assert (setting.new_rows, setting.prefetch) == ("1/8", "predict")
    assert f"{setting.channels}x{setting.bits}" == word.split(":")[0]
    assert (file is None) == (":" not in word)
