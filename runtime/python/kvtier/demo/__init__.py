"""A small real model answers questions about a novel with a tenth of its KV on the device; run it
with ``python -m kvtier.demo``.

``emma.txt.gz`` is the beginning of Jane Austen's *Emma* (1815, public domain), without its first
words, with three planted facts: the text of the attention trace in tests/traces.
"""
