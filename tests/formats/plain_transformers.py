"""Run as a process of its own: load checkpoints with transformers alone, and write their logits.

    python plain_transformers.py ROWS OUTPUT FOLDER...
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

rows = load_file(sys.argv[1])["rows"]
logits = {}
for index, folder in enumerate(sys.argv[3:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits[str(index)] = model(rows, use_cache=False).logits.contiguous()
assert "sinkquant" not in sys.modules
save_file(logits, sys.argv[2])
