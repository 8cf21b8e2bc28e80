"""Continuous batching: a sequence's tokens are the same whoever comes and goes beside it."""

import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch

from offload_runtime.choosing import make_chooser
from offload_runtime.continuous import ContinuousBatch
from offload_runtime.errors import UserError
from offload_runtime.prefetch.lanes import Lanes

from .models import identity_calibration, offloaded, random_ids, random_llama

# Shorter than the sinks, within sinks + recent, around a chunk (64), several chunks.
LENGTHS = [3, 15, 64, 300, 40, 131, 7]
NEW_TOKENS = [5, 12, 9, 6, 14, 1, 8]


@pytest.fixture(scope="module")
def model():
    return random_llama(device="cuda" if torch.cuda.is_available() else "cpu")


def runtime_of(model, **settings):
    runtime = offloaded(model, **{"budget": 24, "slots": 40, **settings})
    runtime.calibration = identity_calibration(model)
    return runtime


def requests(device):
    return [
        (random_ids(n, seed=n, device=device)[0], new) for n, new in zip(LENGTHS, NEW_TOKENS, strict=True)
    ]


def alone(runtime, prompt, new_tokens, **sampling):
    options = {"do_sample": False, **sampling}
    return runtime.generate(prompt[None], max_new_tokens=new_tokens, **options)[0, len(prompt) :].tolist()


def together(batch: ContinuousBatch, runtime, wanted, order, **sampling):
    """Every request's Finished by its index; a place that falls free takes the next one."""
    options = {"do_sample": False, **sampling}
    waiting, done = list(order), {}
    while waiting or batch.running:
        prompt, new_tokens = wanted[waiting[0]] if waiting else (None, 0)
        place = batch.place_for(len(prompt) + new_tokens) if waiting else None
        if place is not None:
            index = waiting.pop(0)
            chooser = make_chooser(runtime.model, prompt, new_tokens, 3, **options)
            batch.join(place, prompt, new_tokens, chooser, index)
        else:
            batch.step()
        done.update({finished.key: finished for finished in batch.take_finished()})
    return done


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("prefetch", ["correct", "predict", "off"])
@pytest.mark.parametrize("new_rows", [None, 3])
def test_tokens_equal_one_at_a_time_in_any_order(model, device, overlap, prefetch, new_rows):
    runtime = runtime_of(model, prefetch=prefetch, new_rows=new_rows)
    wanted = requests(device)
    expected = [alone(runtime, *request) for request in wanted]
    for places, order in ((1, range(7)), (2, [3, 0, 5, 1, 6, 2, 4]), (3, [6, 5, 4, 3, 2, 1, 0])):
        done = together(runtime.continuous(places, 320, overlap=overlap), runtime, wanted, order)
        assert [done[index].tokens for index in range(7)] == expected
        assert {finished.reason for finished in done.values()} == {"length"}


@pytest.mark.parametrize("budget", ["1/16", "1/1"])
def test_budgets_that_are_parts_of_a_sequence(model, device, budget):
    runtime = runtime_of(model, budget=budget, slots=None)
    wanted = requests(device)
    expected = [alone(runtime, *request) for request in wanted]
    done = together(runtime.continuous(3, 320), runtime, wanted, range(7))
    assert [done[index].tokens for index in range(7)] == expected


def test_figures_are_a_sequences_own(model, device):
    """Hit rates and bytes do not depend on the number of places, whose caches have one capacity."""
    runtime, wanted = runtime_of(model), requests(device)
    one = together(runtime.continuous(1, 320), runtime, wanted, range(7))
    three = together(runtime.continuous(3, 320), runtime, wanted, [4, 3, 2, 1, 0, 6, 5])
    for index in range(7):
        assert one[index].moved == three[index].moved
    assert one[3].moved["hit_rate"] > 0
    selected = 24 * model.config.num_key_value_heads * model.config.num_hidden_layers * (NEW_TOKENS[3] - 1)
    assert sum(layer["selected"] for layer in one[3].moved["layers"]) == selected


@pytest.mark.parametrize("prefetch", ["correct", "predict"])
def test_places_of_different_sizes(model, device, prefetch):
    """A sequence takes the smallest empty place that holds it, and its tokens are the same there."""
    runtime, wanted = runtime_of(model, prefetch=prefetch), requests(device)
    expected = [alone(runtime, *request) for request in wanted]
    batch = runtime.continuous(3, 320, place_tokens=(320, 150, 60))
    assert [batch.place_for(tokens) for tokens in (5, 60, 61, 150, 151, 320, 321)] == [2, 2, 1, 1, 0, 0, None]
    done = together(batch, runtime, wanted, range(7))
    assert [done[index].tokens for index in range(7)] == expected
    prompt = wanted[5][0]
    with pytest.raises(UserError, match="need 150 tokens and a place has 60"):
        batch.join(
            2, prompt, 150 - len(prompt), make_chooser(runtime.model, prompt, 9, None, do_sample=False)
        )
    with pytest.raises(UserError, match="give 2 numbers of at most 320"):
        runtime.continuous(2, 320, place_tokens=(320,))


def test_end_tokens(model, device):
    runtime, wanted = runtime_of(model), requests(device)
    plain = [alone(runtime, *request) for request in wanted]
    end = plain[4][6]
    done = together(runtime.continuous(2, 320), runtime, wanted, range(7), eos_token_id=end)
    for index, tokens in enumerate(plain):
        cut = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert done[index].tokens == tokens[:cut]
        assert done[index].reason == ("stop" if end in tokens else "length")
    assert done[4].reason == "stop"


def test_sampling_draws_for_each_sequence_alone(model, device):
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2}
    runtime, wanted = runtime_of(model, seed=3), requests(device)
    expected = [alone(runtime, *request, **options) for request in wanted]
    done = together(runtime.continuous(3, 320), runtime, wanted, [2, 6, 0, 1, 3, 5, 4], **options)
    assert [done[index].tokens for index in range(7)] == expected


@pytest.mark.parametrize("prefetch", ["correct", "predict"])
def test_empty_places_use_no_uninitialised_memory(poisoned, model, device, prefetch):
    runtime, wanted = runtime_of(model, prefetch=prefetch), requests(device)
    batch = runtime.continuous(3, 320)
    for _ in range(3):
        batch.step()
        assert torch.isfinite(batch.session.decoder.logits).all()
    done = together(batch, runtime, wanted, range(7))
    assert torch.isfinite(batch.session.decoder.logits).all()
    assert len(done) == 7
    assert batch.session.state.lengths.tolist() == [0, 0, 0]


def test_newcomers_prefill_while_others_decode(model, device):
    """What a newcomer sees of the others between its chunks: they go on (chunk by step on a CPU)."""
    runtime = runtime_of(model)
    batch = runtime.continuous(2, 400)
    (long, _), (short, _) = requests(device)[3], requests(device)[4]
    greedy = {"do_sample": False}
    batch.join(0, short, 60, make_chooser(runtime.model, short, 60, None, **greedy))
    seen = []

    def on_stage(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            seen.append(len(batch.running[0].tokens))

    batch.join(1, long, 3, make_chooser(runtime.model, long, 3, None, **greedy), on_stage=on_stage)
    assert len(seen) == 5 * model.config.num_hidden_layers  # 300 tokens in chunks of 64
    if device == "cpu":
        assert all(b - a == 1 for a, b in itertools.pairwise(seen))


def test_errors_have_their_owner(model, device, monkeypatch):
    runtime = runtime_of(model)
    batch = runtime.continuous(2, 320)
    prompt = requests(device)[3][0]
    chooser = make_chooser(runtime.model, prompt, 5, None, do_sample=False)
    with pytest.raises(UserError, match=r"need 5300 tokens and a place has 1024"):
        batch.join(0, prompt, 5000, chooser)
    batch.join(0, prompt, 5, chooser, "first")

    def fail(_):
        raise MemoryError("no room")

    monkeypatch.setattr(batch.session, "step", fail)
    batch.join(1, prompt, 5, chooser, "second")  # not to blame for what befell the first meanwhile
    with pytest.raises(MemoryError, match="no room"):
        batch.step()


def test_several_places_need_a_calibration(model):
    with pytest.raises(UserError, match="several places need a calibration"):
        offloaded(model, budget=24).continuous(2, 320)
    with pytest.raises(UserError, match="audit"):
        runtime_of(model, audit_every=2).continuous(2, 320)


class ShownLanes(Lanes):
    """As on a GPU whose prefill is always, or never, through with what it was given; notes who left SMs."""

    def __init__(self, ahead):
        super().__init__(torch.device("cpu"))
        self.on_gpu, self.left = True, ahead
        self.leaves = []

    @contextmanager
    def prefilling(self, leave_sms):
        self.leaves.append(leave_sms)
        yield

    def decoding(self):
        return nullcontext()

    def ahead(self):
        return self.left

    def follow_caller(self):
        pass

    mark = meet = follow_caller

    def wait(self, ahead):
        pass


@pytest.mark.parametrize("ahead", [0, 1])
def test_prefills_leave_sms_to_steps_that_were_late(model, ahead):
    """Steps that begin when the GPU has nothing of the prefill left are late."""
    runtime = runtime_of(model)
    batch = runtime.continuous(3, 400)
    batch.lanes = ShownLanes(ahead)
    for index in range(3):
        prompt = random_ids(300, seed=index, device=runtime.model.device)[0]
        batch.join(index, prompt, 50, make_chooser(runtime.model, prompt, 50, 3, do_sample=False), index)
    assert batch.lanes.leaves == [False, False, ahead == 0]
