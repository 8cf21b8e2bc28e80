"""ds-offload: decode at long context with the KV cache in pinned host memory.

The public names load on first use, so that `import offload_runtime` stays cheap.
"""

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
