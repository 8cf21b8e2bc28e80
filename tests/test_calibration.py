"""Calibration: the mathematics, the collection over text, the file and the command's errors."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from offload_runtime.adapter import ModelAdapter
from offload_runtime.calibrate_command import calibrate
from offload_runtime.calibration import Calibration, calibrate_layer
from offload_runtime.calibration_collect import (
    Collection,
    attend,
    calibrate_prompt,
    collect,
    make_blocks,
    selection_recall,
)
from offload_runtime.calibration_maps import LayerMoments, label_maps, spread
from offload_runtime.errors import RunError, UserError
from offload_runtime.kernels.labels import quantise, read_labels
from offload_runtime.model_check import embedded_model

from .tiny_model import SIZES, save_tiny_llama, tiny_llama


def skewed(heads, tokens, dim, seed):
    """Vectors [heads, tokens, dim] with a decaying spectrum in a random basis and a mean."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=g)).Q
    vectors = torch.randn(heads, tokens, dim, generator=g) * torch.logspace(0.5, -1.5, dim)
    return vectors @ basis + torch.randn(heads, 1, dim, generator=g)


def approximate(queries, keys, maps):
    """q.k as the labels see it, [Hq, T, T]."""
    query_map, key_map, mean = (m.double() for m in maps)
    group = queries.shape[0] // keys.shape[0]
    queries, keys = queries.double(), keys.double()
    labels = torch.einsum("hrd,htd->htr", key_map, keys - mean[:, None]).repeat_interleave(group, 0)
    query_labels = torch.einsum("hrd,htd->htr", query_map, queries)
    offset = torch.einsum("htd,hd->ht", queries, mean.repeat_interleave(group, 0))
    return query_labels @ labels.mT + offset[..., None]


def test_projection_to_head_dim_keeps_every_score():
    queries, keys = skewed(4, 200, 32, 1), skewed(2, 200, 32, 2)
    exact = queries.double() @ keys.double().repeat_interleave(2, 0).mT
    got = approximate(queries, keys, calibrate_layer(queries, keys, 32))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-4)  # maps are float32


@pytest.mark.parametrize("channels", [1, 5, 8, 24])
def test_projection_is_the_best_of_its_rank(channels):
    """Without a ridge the mean square error is the sum of the squared singular values left out."""
    queries, keys = skewed(2, 500, 32, 1), skewed(1, 500, 32, 2)
    mean = keys.double().mean(1)
    flat, centred = queries.double().flatten(0, 1), keys[0].double() - mean
    cq, ck = flat.T @ flat / 1000, keys[0].double().T @ keys[0].double() / 500
    query_map, key_map = label_maps(cq[None], ck[None], mean, channels, 2, ridge=0.0)
    exact = flat @ centred.T
    error = exact - (flat @ query_map[0].double().T) @ (centred @ key_map[0].double().T).T

    def root(moment):
        values, vectors = torch.linalg.eigh(moment)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    singular = torch.linalg.svdvals(root(cq) @ root(ck - torch.outer(mean[0], mean[0])))
    expected = singular[channels:].square().sum()
    torch.testing.assert_close(error.square().mean(), expected, rtol=1e-4, atol=0)


def test_channels_finds_planted_outliers():
    g = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 64, 32, generator=g), torch.randn(2, 64, 32, generator=g)
    planted = [[3, 17, 30], [0, 9, 31]]
    for head, channels in enumerate(planted):
        keys[head, :, channels] *= 10
    query_map, key_map, mean = calibrate_layer(queries, keys, 3, "channels")
    assert key_map.argmax(-1).tolist() == planted
    assert key_map.sum(-1).eq(1).all()
    assert torch.equal(query_map, key_map.repeat_interleave(2, 0))
    assert not mean.any()


def test_channel_criteria_look_at_what_they_name():
    queries, keys = torch.ones(2, 8, 6), torch.ones(1, 8, 6)
    queries[..., 1], keys[..., 4], queries[..., 5], keys[..., 5] = 5, 5, 3, 3
    methods = "channels-q", "channels-k", "channels"
    best = [calibrate_layer(queries, keys, 1, method)[1].argmax().item() for method in methods]
    assert best == [1, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 24, 32])
def test_spread_is_orthogonal(size):
    torch.testing.assert_close(spread(size) @ spread(size).T, torch.eye(size, dtype=torch.float64))


def test_rotation_makes_four_bits_lose_less():
    queries, keys = skewed(1, 2000, 64, 3), skewed(1, 2000, 64, 4)
    query_map, key_map, mean = calibrate_layer(queries, keys, 32)
    labels, query_labels = (keys[0] - mean) @ key_map[0].T, queries[0] @ query_map[0].T
    variance = labels.var(0)
    assert variance.max() / variance.min() < 1.2  # the spread of the channels after the Hadamard matrix

    def loss(back):
        rotated = labels @ back
        rounded = read_labels(*quantise(rotated, 4), 4)
        return ((query_labels @ back) @ (rounded - rotated).T).square().mean()

    assert loss(torch.eye(32)) < 0.8 * loss(spread(32).float())


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_fewer_tokens_than_dimensions(tokens):
    queries, keys = skewed(4, tokens, 64, 1), skewed(2, tokens, 64, 2)
    maps = calibrate_layer(queries, keys, 48)
    assert [tuple(m.shape) for m in maps] == [(4, 48, 64), (2, 48, 64), (2, 64)]
    assert all(m.dtype == torch.float32 and m.isfinite().all() for m in maps)
    exact = queries.double() @ keys.double().repeat_interleave(2, 0).mT
    torch.testing.assert_close(approximate(queries, keys, maps), exact, rtol=1e-3, atol=1e-3)


def test_keys_without_signal_give_zero_maps():
    maps = calibrate_layer(torch.zeros(2, 10, 16), torch.zeros(1, 10, 16), 8)
    assert all(m.isfinite().all() for m in maps)


def test_bad_requests_are_one_line():
    queries, keys = skewed(2, 10, 16, 1), skewed(1, 10, 16, 2)
    with pytest.raises(UserError, match="head_dim is 16"):
        calibrate_layer(queries, keys, 17)
    with pytest.raises(UserError, match="choose one of projection, channels"):
        calibrate_layer(queries, keys, 8, "pca")


FAMILIES = [
    LlamaConfig(**SIZES, head_dim=32),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=32),
    Phi3Config(**SIZES),
    Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    GptOssConfig(
        **SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.model_type)
def test_collection_sees_every_token_of_every_layer(config):
    """Turning keys to other places keeps their length: the moments' traces are those of a plain forward."""
    torch.manual_seed(0)
    adapter = ModelAdapter(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    blocks = [torch.randint(3, 264, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 33)]
    collection = collect(adapter, blocks, 4096, seed=0)
    plain = [0.0] * 3

    def handler_of(index):
        def handle(call):
            plain[index] += float(call.key.double().square().sum())
            group = call.query.shape[1] // call.key.shape[1]
            logits = call.query @ call.key.repeat_interleave(group, 1).mT * call.scale
            count = logits.shape[-1]
            age = torch.arange(count)[:, None] - torch.arange(count)
            hidden = (age < 0) | ((age >= call.window) if call.window else False)
            logits = logits.masked_fill(hidden, float("-inf"))
            if call.sink_logits is not None:
                sink = call.sink_logits.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
                logits = torch.cat([logits, sink], -1)
            mass = logits.softmax(-1)[..., :count]
            return (mass @ call.value.repeat_interleave(group, 1)).transpose(1, 2)

        return handle

    with torch.no_grad(), adapter.handled_by([handler_of(i) for i in range(3)]):
        for block in blocks:
            adapter.base(input_ids=block[None], use_cache=False)
    moments = collection.layer_moments()
    assert [m.tokens for m in moments] == [73] * 3
    traces = [float(m.key.diagonal(dim1=1, dim2=2).sum()) for m in moments]
    assert traces == pytest.approx(plain, rel=1e-4)
    assert [len(r) for r in collection.recalls] == [0, 2, 2]


def test_prediction_is_judged_by_recall():
    adapter = ModelAdapter(tiny_llama())
    calls = []

    def keep(call):
        calls.append(call)
        return torch.zeros_like(call.query).transpose(1, 2)

    with torch.no_grad(), adapter.handled_by([keep] * 3):
        adapter.base(input_ids=torch.arange(3, 203)[None], use_cache=False)
    places = torch.tensor([150, 199])
    query = calls[1].query[0, :, places]
    assert selection_recall(calls[1], query, places) == 1.0
    assert selection_recall(calls[1], -query, places) < 0.3
    assert Collection([None] * 4, [[], [0.3, 0.4], [0.6], [0.4, 0.7]]).unpredicted_layers() == (0, 1)


def test_blocks_cover_the_text():
    prefix = torch.tensor([1])
    blocks = make_blocks(torch.arange(100, 1100), prefix, 400, 150, seed=3)
    assert [len(b) for b in blocks] == [134, 134, 134]
    assert all(b[0] == 1 and b[1:].diff().eq(1).all() for b in blocks)
    starts = [int(b[1]) for b in blocks]
    assert starts == sorted(starts)
    assert starts[2] >= 766  # a third of the text each
    assert [len(b) for b in make_blocks(torch.arange(90), prefix, 400, 150, seed=3)] == [91]


@pytest.fixture
def model_directory(tmp_path):
    return save_tiny_llama(tmp_path / "model")


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The whale, said Ahab, is no fish for you. " * 20)
    return file


def test_command_writes_the_same_file_twice(model_directory, text_file, tmp_path):
    seen = []
    first = tmp_path / "a.safetensors"
    calibrate(model_directory, [text_file], channels=8, out=first, tokens=300, device="cpu",
              progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    second = calibrate(model_directory, [text_file], channels=8, tokens=300, device="cpu")
    assert second == model_directory / "calibration.safetensors"
    one, two = Calibration.load(first), Calibration.load(second)
    assert torch.equal(one.query_map, two.query_map)
    assert torch.equal(one.key_map, two.key_map)
    assert one.key_map.shape == (3, 2, 8, 32)
    assert one.unpredicted_layers[0] == 0
    assert seen == [(1, 3), (2, 3), (3, 3)]
    one.check(AutoConfig.from_pretrained(model_directory))


def test_command_errors_name_what_is_wrong(model_directory, text_file, tmp_path):
    def fails(match, model=model_directory, texts=(text_file,), **options):
        with pytest.raises(UserError, match=match) as raised:
            calibrate(model, texts, device="cpu", **options)
        assert "\n" not in str(raised.value)

    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("Call me Ishmael.")
    binary.write_bytes(b"whale \xff\xfe")
    fails("too few for 32 label channels", texts=[short])
    fails("too few for 32 label channels", tokens=10)
    fails("head_dim is 32", channels=33)
    fails("no_such.txt", texts=[tmp_path / "no_such.txt"])
    fails("not UTF-8", texts=[binary])
    fails("needs a text", texts=[])
    fails("choose one of", method="magic")
    fails("say where", model="some-org/some-model")
    fails("in a directory that exists", out=tmp_path / "nowhere" / "file")
    fails("no config.json", model=tmp_path, out=tmp_path / "file")
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=50))
    with pytest.raises(UserError, match=r"(?i)gpt2.* is not supported"):
        ModelAdapter(gpt2)


def test_file_round_trip_and_foreign_models(tmp_path):
    adapter = ModelAdapter(tiny_llama())
    made = calibrate_prompt(adapter, torch.arange(3, 103), 8, positions=4096)
    file = tmp_path / "calibration.safetensors"
    made.save(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    read = Calibration.load(file)
    for name in ("query_map", "key_map", "key_mean"):
        assert torch.equal(getattr(read, name), getattr(made, name))
    assert (read.unpredicted_layers, read.provenance) == (made.unpredicted_layers, made.provenance)
    read.check(adapter.model.config)
    with pytest.raises(UserError, match=r"3 layers.*this model has 2 layers"):
        read.check(tiny_llama(num_hidden_layers=2).config)
    with pytest.raises(UserError, match=r"another model \(rope .*500"):
        read.check(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}).config)
    with pytest.raises(UserError, match=r"vocab_size 264 there, 300 here"):
        read.check(tiny_llama(vocab_size=300).config)


def test_unreadable_and_unwritable_files(tmp_path):
    with pytest.raises(UserError, match="there is no calibration file"):
        Calibration.load(tmp_path / "absent")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no safetensors at all")
    with pytest.raises(UserError, match="is not a calibration file"):
        Calibration.load(garbage)
    save_file({"weight": torch.zeros(1)}, garbage)
    with pytest.raises(UserError, match="is not a calibration file"):
        Calibration.load(garbage)
    made = calibrate_prompt(ModelAdapter(tiny_llama()), torch.arange(3, 103), 8, positions=4096)
    with pytest.raises(RunError, match="cannot write"):
        made.save(tmp_path / "nowhere" / "file")


def test_prompt_calibration_holds_at_places_the_prompt_did_not_reach():
    """Moments at a prompt's own first places miss keys that RoPE has turned further; random places do not."""
    adapter = ModelAdapter(AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval())
    ids = torch.tensor(list(b"The pass key for silly-walrus is 48213. It was a dark and stormy night. " * 3))
    calls = []

    def keep(call):
        calls.append(call)
        return attend(call)

    with torch.no_grad(), adapter.handled_by([keep] * 8):
        for start in (0, 100_000):
            positions = torch.arange(start, start + len(ids))[None]
            adapter.base(input_ids=ids[None], position_ids=positions, use_cache=False)
    whole = calibrate_prompt(adapter, ids, 32, positions=262_144)

    def error(far, maps):
        exact = far.query[0].double() @ far.key[0].double().repeat_interleave(2, 0).mT
        wrong = approximate(far.query[0], far.key[0], maps) - exact
        wrong -= wrong.mean(-1, keepdim=True)  # a shift of all scores selects the same keys
        return wrong.square().mean()

    own = [
        error(far, calibrate_layer(near.query[0], near.key[0], 32))
        for near, far in zip(calls[:8], calls[8:], strict=True)
    ]
    maps = zip(whole.query_map, whole.key_map, whole.key_mean, strict=True)
    turned = [error(far, layer) for far, layer in zip(calls[8:], maps, strict=True)]
    assert sum(turned) < 0.75 * sum(own)  # measured 0.57


def test_moments_of_parts_add_up():
    queries, keys = skewed(4, 100, 16, 1), skewed(2, 100, 16, 2)
    whole, part = LayerMoments.of(queries, keys), LayerMoments.of(queries[:, :30], keys[:, :30])
    part.add(LayerMoments.of(queries[:, 30:], keys[:, 30:]))
    for method in ("projection", "channels"):
        for a, b in zip(whole.maps(8, method), part.maps(8, method), strict=True):
            torch.testing.assert_close(a, b)


def test_shipped_calibration_belongs_to_the_embedded_model():
    calibration = Calibration.load(f"{embedded_model()}/calibration.safetensors")
    calibration.check(AutoConfig.from_pretrained(embedded_model()))
    assert calibration.key_map.shape == (8, 2, 32, 128)
    assert calibration.provenance["method"] == "projection"
    assert calibration.unpredicted_layers == (0,)
    assert calibration.input_shift is None  # its layer 1 has a guess instead
    assert calibration.guesses.layers == set(range(1, 8))
