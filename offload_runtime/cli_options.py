"""The options that commands share, and how they become settings."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .model_source import ModelSource

Model = Annotated[
    str | None, typer.Option(help="Model directory or hub name; default: the small model that ships here.")
]
Ctx = Annotated[int | None, typer.Option(help="Most tokens of prompt and answer.", show_default="262144")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Tokens attended to per KV head: a count, or a part of the context.", show_default="1/16"
    ),
]
BudgetMass = Annotated[
    float | None,
    typer.Option(
        help="Select for every KV head only what holds this share of the attention mass, --budget at most."
    ),
]
Prefetch = Annotated[str | None, typer.Option(help="correct, predict or off.", show_default="correct")]
LabelChannels = Annotated[int | None, typer.Option(help="Label numbers kept of a key.", show_default="32")]
LabelBits = Annotated[int | None, typer.Option(help="Bits of a label number: 16, 8 or 4.", show_default="4")]
Sinks = Annotated[int | None, typer.Option(help="First tokens always attended to.", show_default="16")]
Recent = Annotated[int | None, typer.Option(help="Last tokens always attended to.", show_default="64")]
Slots = Annotated[
    int | None, typer.Option(help="Resident rows per layer and KV head.", show_default="twice the budget")
]
NewRows = Annotated[
    str | None,
    typer.Option(
        help="Sticky selection: new rows a step at most, a count or a part of the budget; none is exact.",
        show_default="auto: 2048 or 1/8 of ctx's budget; none if prefetch is predict",
    ),
]
ChunkTokens = Annotated[int | None, typer.Option(help="Tokens a prefill chunk.", show_default="by device")]
CalibrationFile = Annotated[str | None, typer.Option("--calibration", help="A file from `calibrate`.")]
Seed = Annotated[int | None, typer.Option(help="Seed of sampling.")]
Audit = Annotated[
    int | None,
    typer.Option(
        help="Compare every N-th decode step with exact attention; its cost is printed.", show_default="off"
    ),
]
NoCudaGraph = Annotated[bool, typer.Option("--no-cuda-graph", help="Run decode steps without a CUDA graph.")]
Placement = Annotated[
    str | None,
    typer.Option(help="Where KV rows are kept: host, gpu, or auto (gpu if they fit).", show_default="host"),
]
GpuMemory = Annotated[
    float | None, typer.Option(help="GB of GPU memory to use at most, as if the card had no more.")
]
Fit = Annotated[
    bool, typer.Option("--fit", help="Shrink slots, then label bits, then the budget until it fits.")
]
SaveCache = Annotated[
    Path | None, typer.Option(help="Keep the prompt's cache in this directory, answer included.")
]
LoadCache = Annotated[
    Path | None, typer.Option(help="Go on from a saved cache: only what the prompt adds is prefilled.")
]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu.")]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32.", show_default="the model's; float32 on CPU")
]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
Token = Annotated[str | None, typer.Option(help="Hub access token.", envvar="HF_TOKEN", show_envvar=True)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow a model's own Python code to run.")
]

RopeScaling = Annotated[
    str | None, typer.Option(help="Stretch RoPE past the trained length: yarn:4 or linear:4.")
]
Quantize = Annotated[str | None, typer.Option(help="bnb-4bit or torchao-int8, if the package is there.")]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file in the model's directory or repository.")]

SETTINGS = (
    "ctx",
    "budget",
    "budget_mass",
    "prefetch",
    "label_channels",
    "label_bits",
    "sinks",
    "recent",
    "slots",
    "new_rows",
    "chunk_tokens",
    "calibration",
    "seed",
    "placement",
    "gpu_memory",
)
DTYPES = ("bfloat16", "float16", "float32")


def model_source(given: dict[str, Any]) -> ModelSource:
    """From a command's options; UserError for a device or dtype there is not."""
    dtype, device = given["dtype"], given["device"]
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if device not in ("auto", "cpu", "cuda") and not device.removeprefix("cuda:").isdigit():
        raise UserError(f"--device is {device!r}; choose auto, cuda or cpu")
    name = model_or_embedded(given["model"])
    names = ("revision", "token", "trust_remote_code", "rope_scaling", "quantize", "gguf_file")
    return ModelSource(name, device, dtype, **{field: given[field] for field in names if field in given})


def model_or_embedded(model: str | None) -> str:
    """The model asked for, or the directory of the one that ships with the package."""
    if model is None:
        return str(Path(__file__).parent / "data" / "tiny-256k")
    if not model.strip():
        raise UserError("--model is empty; give a model directory or a hub name")
    return model


def runtime_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of RuntimeConfig that the user gave; the rest keep its defaults."""
    settings = {name: given[name] for name in SETTINGS if given.get(name) is not None}
    if given.get("audit") is not None:
        settings["audit_every"] = given["audit"]
    if given.get("no_cuda_graph"):
        settings["cuda_graph"] = False
    if given.get("fit"):
        settings["fit"] = True
    return settings


def sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' generate. Sampling is on if any of its options is given."""
    temperature, top_p, top_k = given["temperature"], given["top_p"], given["top_k"]
    penalty = given["repetition_penalty"]
    if temperature is not None and temperature < 0:
        raise UserError(f"--temperature is {temperature}; it must be 0 (greedy) or above")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}; it must be above 0 and at most 1")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k is {top_k}; it must be at least 1")
    if penalty is not None and penalty <= 0:
        raise UserError(f"--repetition-penalty is {penalty}; it must be above 0 (1 is none)")
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    chosen = {name: value for name, value in options.items() if value is not None}
    if not chosen or temperature == 0:
        chosen = {}
    chosen["do_sample"] = bool(chosen)
    if penalty is not None:
        chosen["repetition_penalty"] = penalty
    return chosen
