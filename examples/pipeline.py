"""A text-generation pipeline over an offloaded cache.

python examples/pipeline.py [model directory or hub name]
"""

import sys

import torch
from transformers import pipeline

from offload_runtime import OffloadedCache, RuntimeConfig
from offload_runtime.model_check import embedded_model

source = sys.argv[1] if len(sys.argv) > 1 else embedded_model()
device = 0 if torch.cuda.is_available() else -1
pipe = pipeline(
    "text-generation", model=source, device=device, dtype="auto" if device == 0 else torch.float32
)

cache = OffloadedCache(pipe.model, RuntimeConfig(ctx=4096, budget="1/16"))
for prompt in ("The river runs past the town of ", "It was late in the year when "):
    print(pipe(prompt, past_key_values=cache, max_new_tokens=16, do_sample=False)[0]["generated_text"])
