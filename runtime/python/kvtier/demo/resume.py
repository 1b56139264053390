"""The demo's second process: goes on with a conversation that another one saved.

python -m kvtier.demo.resume CONVERSATION.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    saved = json.loads(Path(sys.argv[1]).read_text())
    import torch

    from ..transformers import TieredCache
    from .talk import Talk, load, weights_name

    path = Path(saved["model"])
    model, tokenizer = load(path)
    with torch.inference_mode(), TieredCache(model, **saved["cache"]) as cache:
        name = weights_name(path)
        started = time.monotonic()
        cache.open_store(saved["store"], model=name)
        tokens = cache.restore(saved["ids"])
        restore_s = time.monotonic() - started
        if tokens == 0:
            sys.exit("nothing was restored: the store does not know this conversation")
        talk = Talk(model, tokenizer, cache)
        unread = saved["ids"][tokens:]
        answer = talk.ask(saved["question"], unread=unread)
        store = cache.stats()["store"]
    print(f"   restored         {answer}\n")
    print(f"restored {tokens} of {len(saved['ids'])} tokens in {restore_s:.2f} s: "
          f"{store['read_bytes'] / 2**20:.0f} MiB, {store['blocks_verified']} blocks verified; "
          f"computed the other {len(unread)} and the question in {talk.first_token_s:.2f} s")
    print(f"time to first token, restored {restore_s + talk.first_token_s:6.1f} s")


if __name__ == "__main__":
    main()
