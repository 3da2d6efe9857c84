"""Ids that Hugging Face `tokenizers` gives to each line of a text.

Usage: python tests/peer_ids.py TOKENIZER_JSON OUT < TEXT; OUT gets the ids, 4 bytes each, little end first, with
2^32 - 1 after each line.
"""

import sys
from array import array

from tokenizers import Tokenizer

END_OF_LINE = 2**32 - 1
LINES_AT_ONCE = 4096

tokenizer = Tokenizer.from_file(sys.argv[1])
lines = sys.stdin.buffer.read().decode().split("\n")
with open(sys.argv[2], "wb") as out:
    for start in range(0, len(lines), LINES_AT_ONCE):
        some = lines[start : start + LINES_AT_ONCE]
        for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
            ids = array("I", encoding.ids)
            ids.append(END_OF_LINE)
            if sys.byteorder == "big":
                ids.byteswap()
            ids.tofile(out)
