"""What transformers makes of a directory: the five most likely next tokens at each position, and a text's ids.

python tests/peer_logits.py DIRECTORY '[1, 2, 3]' [TEXT]
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, ids, *text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
with torch.no_grad():
    logprobs = model(torch.tensor([json.loads(ids)])).logits[0].double().log_softmax(-1)
top = logprobs.topk(5)
print(json.dumps({
    "top": [list(zip(ids, logprobs)) for ids, logprobs in zip(top.indices.tolist(), top.values.tolist())],
    "ids": AutoTokenizer.from_pretrained(directory)(text[0]).input_ids if text else None,
}))
