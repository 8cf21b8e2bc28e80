"""ds-offload: decode at long context with the KV cache in pinned host memory.

The public names load on first use, so that `import offload_runtime` stays cheap.
"""

__version__ = "0.1.0"
