"""Where a model comes from and how it is to be loaded, as commands pass it on. No torch: --help is fast."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Options that make another model of the same name: its texts and its results are not comparable.
WEIGHT_FORMS = ("rope_scaling", "quantize", "gguf_file")


@dataclass(frozen=True)
class ModelSource:
    """A model by directory, hub name or GGUF file, and the options of loading it."""

    name_or_path: str
    device: str
    dtype: str | None
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    rope_scaling: str | None = None
    quantize: str | None = None
    gguf_file: str | None = None

    def hub(self) -> dict[str, Any]:
        """The arguments that loading a config, a tokenizer and weights share."""
        return {
            "gguf_file": self.gguf_file,
            "revision": self.revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }

    def loading(self) -> dict[str, Any]:
        """The keyword arguments of load_model, all but the device."""
        forms = {"dtype": self.dtype, "rope_scaling": self.rope_scaling, "quantize": self.quantize}
        return {**forms, **self.hub()}

    @property
    def label(self) -> str:
        """The model's name in results and their files, with what sets it apart from others of that name."""
        told = (self.revision, self.dtype, *(getattr(self, form) for form in WEIGHT_FORMS))
        words = [Path(self.name_or_path).name, *(word for word in told if word is not None)]
        return re.sub(r"[^\w.=+-]", "-", "-".join(words))
