"""Records an attention trace of a local model: python -m kvtier.record --model FOLDER_OR_GGUF
--prompt FILE --output FOLDER

The prompt is text as the model reads it; with --chat it is what the user says. The model answers
greedily; every token of the answer is a step of the trace.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kvtier.record", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder or .gguf")
    parser.add_argument("--prompt", required=True, type=Path, help="text file, or - for stdin")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--layers", help="as 7,21; default: every layer of full attention")
    parser.add_argument("--prompt-queries", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--chunk-tokens", type=int, default=2048,
                        help="of the prompt, how many are computed at once; bounds memory")
    parser.add_argument("--dtype", default="float16", help="of what is stored")
    parser.add_argument("--no-oracle", action="store_true", help="leave out exact attention")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument("--text", help="what the text is and its licence, for the manifest")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    choices = arguments(given)
    try:
        layers = [int(each) for each in choices.layers.split(",")] if choices.layers else None
    except ValueError:
        sys.exit(f"--layers: found {choices.layers!r}, expected numbers, as 7,21")
    if choices.new_tokens < 2 or choices.chunk_tokens < 1:
        sys.exit("--new-tokens is at least 2 (the last one is not attended), --chunk-tokens 1")
    stdin = str(choices.prompt) == "-"
    prompt = sys.stdin.read() if stdin else choices.prompt.read_text(encoding="utf-8")
    from .demo.talk import load, weights_name
    from .errors import Error

    model, tokenizer = load(choices.model)
    ids = _ids(tokenizer, prompt, choices.chat)
    about: dict[str, Any] = {
        "model": {"name": choices.model.name, "weights": weights_name(choices.model)},
    }
    if choices.text:
        about["text"] = choices.text
    try:
        answer = record_answer(
            model, tokenizer, ids, choices.output, new_tokens=choices.new_tokens,
            chunk_tokens=choices.chunk_tokens, layers=layers, dtype=choices.dtype,
            prompt_queries=choices.prompt_queries, oracle=not choices.no_oracle, about=about,
        )
    except Error as error:
        sys.exit(f"kvtier.record: {error}")
    print(f"{choices.output}: {len(ids)} tokens of prompt, {len(answer)} of answer")
    print(tokenizer.decode(answer))


def _ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt, add_special_tokens=False).input_ids)
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def record_answer(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    output: Path,
    *,
    new_tokens: int,
    chunk_tokens: int,
    **choices: Any,
) -> list[int]:
    """Prompt in chunks, then greedy tokens; what was answered."""
    import torch

    from .transformers import record
    from .transformers.recording import Reader

    with torch.inference_mode(), record(
        model, output, tokenizer=tokenizer, context_tokens=len(ids), **choices
    ) as recording:
        reader = Reader(model, chunk_tokens)
        stop = _stops(model, tokenizer)
        reader.read(ids)
        answer = reader.answer(new_tokens, stop)
    if recording.difference is not None:
        print(f"attention over what was recorded differs from the model's own outputs by "
              f"{recording.difference:.1e} of their largest value", file=sys.stderr)
    return answer


def _stops(model: Any, tokenizer: Any) -> set[int]:
    found: set[int] = set()
    for each in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found |= set(each) if isinstance(each, list) else {each}
    return found - {None}


if __name__ == "__main__":
    main()
