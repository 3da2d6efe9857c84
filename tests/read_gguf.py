"""Prints what PyPI's gguf reads in a file: architecture, template, and the sum of every tensor's absolute values."""

import json
import sys

import numpy
from gguf import GGUFReader
from gguf.quants import dequantize

reader = GGUFReader(sys.argv[1])
text = lambda key: reader.fields[key].contents()
values = lambda tensor: dequantize(tensor.data, tensor.tensor_type).astype(numpy.float64)
print(json.dumps({
    "architecture": text("general.architecture"),
    "chat_template": text("tokenizer.chat_template"),
    "sums": {tensor.name: float(numpy.abs(values(tensor)).sum()) for tensor in reader.tensors},
}))
