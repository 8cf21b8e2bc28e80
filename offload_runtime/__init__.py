"""ds-offload: decode at long context with the KV cache in pinned host memory.

The public names load on first use, so that `import offload_runtime` stays cheap.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers see; at run time __getattr__ answers
    from .config import RuntimeConfig as RuntimeConfig
    from .engine import OffloadedModel as OffloadedModel
    from .hf_cache import OffloadedCache as OffloadedCache

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "OffloadedModel":
        from .engine import OffloadedModel

        return OffloadedModel
    if name == "OffloadedCache":
        from .hf_cache import OffloadedCache

        return OffloadedCache
    if name == "RuntimeConfig":
        from .config import RuntimeConfig

        return RuntimeConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
