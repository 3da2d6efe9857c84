"""The arithmetic of lm-evaluation-harness by transformers, one sequence at a time: accuracies, and their standard errors.

python tests/reference_eval.py DIRECTORY FILE LIMIT DELIMITER
"""

import json
import math
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, path, limit, delimiter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logprob(context, continuation):
    """Of the continuation, and whether it is what the model would say. Spaces at the context's end are its own."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation).input_ids
    n_context = len(tokenizer(context).input_ids)
    with torch.no_grad():
        logits = model(torch.tensor([whole[:-1]]), logits_to_keep=len(whole) - n_context).logits[0]
    logprobs = logits.log_softmax(-1)
    told = torch.tensor(whole[n_context:])
    return logprobs.gather(1, told[:, None]).sum().item(), bool((logprobs.argmax(-1) == told).all())


def best(values):
    return max(range(len(values)), key=lambda i: (values[i], -i))


metrics = {}
for line in open(path).read().splitlines()[:int(limit)]:
    item = json.loads(line)
    if "context_options" in item:
        sums = [logprob(context + delimiter, item["continuation"])[0] for context in item["context_options"]]
        found = {"acc": best(sums) == item["gold"]}
    elif "choices" in item:
        sums = [logprob(item["query"] + delimiter, choice)[0] for choice in item["choices"]]
        found = {
            "acc": best(sums) == item["gold"],
            "acc_norm": best([x / len(choice) for x, choice in zip(sums, item["choices"])]) == item["gold"],
        }
    else:
        found = {"acc": logprob(item["context"] + delimiter, item["continuation"])[1]}
    for name, value in found.items():
        metrics.setdefault(name, []).append(float(value))

for name, values in metrics.items():
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    metrics[name] = {"value": mean, "stderr": deviation / math.sqrt(len(values))}
print(json.dumps(metrics))
