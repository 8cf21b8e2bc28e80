"""The runtime's own class: load, generate, look at what it cost.

python examples/offloaded_model.py [model directory, hub name or .gguf file]
"""

import sys

from offload_runtime import OffloadedModel
from offload_runtime.model_check import embedded_model

source = sys.argv[1] if len(sys.argv) > 1 else embedded_model()
with OffloadedModel.from_pretrained(source, ctx=4096, budget="1/16") as model:
    story = "The river runs past the town of Brill and on to the sea. " * 10
    inputs = model.tokenizer(story, return_tensors="pt")
    out = model.generate(inputs.input_ids.to(model.model.device), max_new_tokens=20, do_sample=False)
    print(model.tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    print(f"{model.stats['ttft_s']:.2f} s to the first token, hit rate {model.stats['hit_rate']:.0%}")
