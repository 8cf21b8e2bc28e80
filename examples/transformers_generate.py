"""transformers' own generate with an offloaded cache: one argument more, everything else as you know it.

The second call passes the whole conversation; what the cache holds already is not computed again.

python examples/transformers_generate.py [model directory or hub name]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload_runtime import OffloadedCache, RuntimeConfig
from offload_runtime.model_check import embedded_model

source = sys.argv[1] if len(sys.argv) > 1 else embedded_model()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if device == "cuda" else torch.float32)
model, tokenizer = model.to(device), AutoTokenizer.from_pretrained(source)

cache = OffloadedCache(model, RuntimeConfig(ctx=4096, budget="1/16"))
text = "The river runs past the town of "
for more in ("", " In the morning "):
    inputs = tokenizer(text + more, return_tensors="pt").to(device)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=True, top_p=0.9)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    print(text)
