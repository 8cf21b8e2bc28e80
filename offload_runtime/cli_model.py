"""The model a command names: its config with what is to be said about it, its size, its loading."""

from typing import Any

import torch
from transformers import PretrainedConfig

from .cli_exits import warn
from .config import RuntimeConfig
from .engine import OffloadedModel
from .fitting import fit
from .loading import QUANTISERS, quantisation, read_config, scale_rope
from .memory import limit_gpu, measure
from .model_check import check_config, check_label_channels, config_note, position_warning
from .model_source import ModelSource
from .planner import Plan, make_plan
from .weights import Weights, count_weights


def config_of(source: ModelSource) -> PretrainedConfig:
    """The config as it will be loaded; warnings go to stderr."""
    config = read_config(source.name_or_path, **source.hub())
    check_config(config)
    if source.rope_scaling is not None:
        warn(scale_rope(config, source.rope_scaling))
    if source.quantize is not None:
        quantisation(source.quantize, config)  # UserError when its package is missing
        weights = count_weights(config)
        if weights.stacked:
            share = weights.stacked / weights.total
            warn(f"--quantize {source.quantize} leaves this model's experts, {share:.0%} of it, unpacked")
    note = config_note(config)
    if note:
        warn(note)
    return config


def weights_of(source: ModelSource, config: PretrainedConfig) -> Weights:
    """Parameter counts, with the bits that --quantize asks for."""
    weights = count_weights(config)
    return weights if source.quantize is None else weights.quantised(QUANTISERS[source.quantize][1])


def plan_of(
    source: ModelSource,
    config: RuntimeConfig,
    model: PretrainedConfig,
    place: torch.device,
    tokens: int,
    batch: int = 1,
    continuous: bool = False,
    place_tokens: tuple[int, ...] = (),
) -> Plan:
    """Check settings against the model, warn about its range, plan memory for `tokens`."""
    return fitted_plan(source, config, model, place, tokens, batch, continuous, place_tokens)[1]


def fitted_plan(
    source: ModelSource,
    config: RuntimeConfig,
    model: PretrainedConfig,
    place: torch.device,
    tokens: int,
    batch: int = 1,
    continuous: bool = False,
    place_tokens: tuple[int, ...] = (),
) -> tuple[RuntimeConfig, Plan]:
    """plan_of, and the config that the plan is for: with config.fit it is shrunk until it fits, saying so."""
    shape = check_config(model)
    check_label_channels(config.label_channels, shape)
    warning = position_warning(tokens, shape)
    if warning:
        warn(warning)
    dtype = None if source.dtype is None else getattr(torch, source.dtype)
    limit_gpu(str(place), config.gpu_memory)
    free, weights = measure(str(place)), weights_of(source, model)

    def plan(trial: RuntimeConfig) -> Plan:
        return make_plan(
            trial, model, free, place.type, tokens=tokens, batch=batch, dtype=dtype, weights=weights,
            continuous=continuous, place_tokens=place_tokens,
        )  # fmt: skip

    if config.fit:
        config, notes = fit(config, plan)
        for note in notes:
            warn(note)
    return config, plan(config)


def load(source: ModelSource, settings: dict[str, Any]) -> OffloadedModel:
    return OffloadedModel.from_pretrained(
        source.name_or_path, device=source.device, **source.loading(), **settings
    )
