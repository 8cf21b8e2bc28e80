"""Calibration: how one model's keys become labels, with where that came from, in one file.

label = key_map (k - key_mean), query label = query_map q, both after RoPE and
after q_norm and k_norm. calibration_maps.py has the mathematics,
calibration_collect.py runs the model.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from .calibration_maps import METHODS, calibrate_layer, label_maps
from .calibration_mass import MassCurve
from .errors import RunError, UserError
from .input_guess import Guesses

__all__ = ["METHODS", "Calibration", "calibrate_layer", "config_facts", "config_hash", "label_maps"]

# Facts of a config that queries and keys depend on. A list of its own: what
# to_dict() returns differs between transformers versions.
CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class Calibration:
    """The label maps of every layer of a model.

    query_map [L, Hq, R, D], key_map [L, Hkv, R, D] and key_mean [L, Hkv, D],
    float32. unpredicted_layers: those whose prediction from the layer before is
    poor, layer 0 always. provenance: model, config (JSON), config_hash, text_hash,
    tokens, method, label_channels, versions, date. mass_curve: what budgets hold, where
    it was measured. input_shift [L, E] float32: how far a layer's input is from the layer before's on
    average, which the layer's prediction adds (calibration_shift.py); zero or None: nothing to add. guesses:
    of what that layer changes, by the prediction's input (calibration_guess.py), bfloat16 in the file.
    """

    query_map: torch.Tensor
    key_map: torch.Tensor
    key_mean: torch.Tensor
    unpredicted_layers: tuple[int, ...]
    provenance: dict[str, str]
    mass_curve: MassCurve | None = None
    input_shift: torch.Tensor | None = None
    guesses: Guesses | None = None

    def save(self, path: str | Path) -> None:
        """Write the safetensors file whole or not at all; RunError when that fails."""
        tensors = {name: getattr(self, name).float().cpu().contiguous() for name in TENSORS}
        if self.input_shift is not None:
            tensors[SHIFT] = self.input_shift.float().cpu().contiguous()
        if self.guesses is not None:
            for name, part in zip(GUESS, self.guesses.parts, strict=True):
                tensors[name] = part.bfloat16().cpu().contiguous()
        layers = ",".join(map(str, self.unpredicted_layers))
        metadata = {**self.provenance, "unpredicted_layers": layers}
        if self.mass_curve is not None:
            tensors[HELD_MASS] = self.mass_curve.held.contiguous()
            metadata[CONTEXTS] = ",".join(map(str, self.mass_curve.contexts))
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(to_bytes(tensors, metadata))
            os.replace(partial, target)
        except OSError as error:
            raise RunError(f"cannot write calibration {target}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a file that save() wrote; UserError when it is missing or something else."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in TENSORS}
                names = set(file.keys())
                shift = file.get_tensor(SHIFT) if SHIFT in names else None
                guesses = None
                if GUESS[0] in names:
                    guesses = Guesses(*(file.get_tensor(name).float() for name in GUESS))
                metadata = dict(file.metadata() or {})
                contexts = metadata.pop(CONTEXTS, None)
                curve = None
                if contexts is not None:
                    counts = tuple(int(count) for count in contexts.split(","))
                    curve = MassCurve(file.get_tensor(HELD_MASS), counts)
            layers = tuple(int(layer) for layer in metadata.pop("unpredicted_layers").split(","))
        except FileNotFoundError as error:
            raise UserError(f"there is no calibration file {path}") from error
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is not a calibration file ({error}); make one with `ds-offload calibrate`"
            ) from error
        return cls(
            **tensors,
            unpredicted_layers=layers,
            provenance=metadata,
            mass_curve=curve,
            input_shift=shift,
            guesses=guesses,
        )

    def check(self, config: Any) -> None:
        """UserError when this calibration belongs to another model than config's, saying which."""
        facts = config_facts(config)
        layers, query_heads, _, dim = self.query_map.shape
        found = (layers, query_heads, self.key_map.shape[1], dim)
        wanted = tuple(facts[name] for name in CONFIG_FIELDS[4:])
        if found != wanted:
            raise UserError(
                f"the calibration is for {self._name()} ({describe(found)}) but this model has "
                f"{describe(wanted)}; run `ds-offload calibrate` for this model"
            )
        if self.provenance.get("config_hash") != config_hash(config):
            theirs = json.loads(self.provenance.get("config", "{}"))
            names = [name for name in facts if facts[name] != theirs.get(name)] or ["config"]
            differences = ", ".join(f"{n} {theirs.get(n)} there, {facts.get(n)} here" for n in names)
            raise UserError(
                f"the calibration is for {self._name()}, another model ({differences}); "
                "run `ds-offload calibrate` for this model"
            )

    def _name(self) -> str:
        return self.provenance.get("model", "an unnamed model")


TENSORS = ("query_map", "key_map", "key_mean")
SHIFT = "input_shift"
GUESS = ("guess_offset", "guess_down", "guess_up")
HELD_MASS, CONTEXTS = "held_mass", "held_mass_contexts"  # a mass curve's tensor and metadata


def config_facts(config: Any) -> dict[str, Any]:
    """The fields of a transformers config that queries and keys depend on."""
    text = config.get_text_config(decoder=True)
    facts = {name: getattr(text, name, None) for name in CONFIG_FIELDS}
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or facts["num_attention_heads"]
    facts["head_dim"] = facts["head_dim"] or text.hidden_size // text.num_attention_heads
    facts["rope"] = rope_facts(text)
    return facts


def rope_facts(text: Any) -> dict[str, Any]:
    """How positions rotate: rope_parameters, or what older configs call rope_theta and rope_scaling."""
    parameters = getattr(text, "rope_parameters", None)
    if parameters is None:
        scaling = getattr(text, "rope_scaling", None) or {}
        parameters = {"rope_theta": getattr(text, "rope_theta", None), **scaling}
    return {name: value for name, value in parameters.items() if value is not None and value != "default"}


def config_hash(config: Any) -> str:
    return hashlib.sha256(json.dumps(config_facts(config), sort_keys=True).encode()).hexdigest()[:16]


def describe(shape: tuple[int, ...]) -> str:
    layers, query_heads, kv_heads, dim = shape
    return f"{layers} layers, {query_heads} query and {kv_heads} KV heads, head_dim {dim}"
