"""Tokens as they come: TextIteratorStreamer, with generate in a thread.

python examples/stream.py [model directory or hub name]
"""

import sys
from threading import Thread

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from offload_runtime import OffloadedCache, RuntimeConfig
from offload_runtime.model_check import embedded_model

source = sys.argv[1] if len(sys.argv) > 1 else embedded_model()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if device == "cuda" else torch.float32)
model, tokenizer = model.to(device), AutoTokenizer.from_pretrained(source)

streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
options = {
    **tokenizer("The river runs past the town of ", return_tensors="pt").to(device),
    "past_key_values": OffloadedCache(model, RuntimeConfig(ctx=4096, budget="1/16")),
    "streamer": streamer,
    "max_new_tokens": 20,
    "do_sample": False,
}
thread = Thread(target=model.generate, kwargs=options)
thread.start()
for piece in streamer:
    print(piece, end="", flush=True)
print()
thread.join()
