"""Attention as one would write it down, in float64."""

import numpy as np


def attention(keys, values, queries, *, scale=None, cap=0.0, sinks=None):
    """`keys` [tokens, kv_heads, dim], `values`, `queries` [count, query_heads, dim] of the newest
    tokens -> [count, query_heads, value_dim]."""
    keys, values, queries = (np.asarray(a, dtype=np.float64) for a in (keys, values, queries))
    tokens, kv_heads, dim = keys.shape
    count, query_heads, _ = queries.shape
    scale = dim**-0.5 if scale is None else scale
    out = np.empty((count, query_heads, values.shape[2]))
    for i in range(count):
        seen = tokens - count + i + 1
        for head in range(query_heads):
            group = head // (query_heads // kv_heads)
            logits = keys[:seen, group] @ queries[i, head] * scale
            if cap:
                logits = cap * np.tanh(logits / cap)
            top = max(logits.max(), sinks[head] if sinks is not None else -np.inf)
            weights = np.exp(logits - top)
            total = weights.sum() + (np.exp(sinks[head] - top) if sinks is not None else 0.0)
            out[i, head] = weights @ values[:seen, group] / total
    return out
