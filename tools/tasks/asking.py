"""One context: full attention answers, then every selector and budget, forced and free.

What of a question is exact and what selects: the context and the question but for its last token
are computed by full attention, as a long forward is under kvtier; the question's last token and
the answer are decoded, each token under its own selection. So every token of the answer rests on
what was selected.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from instances import Context, Question
from kvtier.transformers import attention
from panel import OBSERVED_QUERIES, Choice, Panel, Row

_STEP = 8  # Most tokens in one selecting forward.
# Of all questions and answers of one conversation.
_QUESTIONS_TOKENS = 384


@dataclasses.dataclass
class _Answer:
    """Of full attention: tokens, and the log-probabilities [tokens, vocabulary] of each place."""

    tokens: list[int]
    log_probabilities: torch.Tensor

    def gaps(self) -> torch.Tensor:
        best = self.log_probabilities.topk(2).values
        return best[:, 0] - best[:, 1]


class Asker:
    def __init__(self, model: Any, tokenizer: Any, choices: list[Choice], answer_tokens: int):
        self._model, self._tokenizer = model, tokenizer
        self._choices, self._answer_tokens = choices, answer_tokens
        self._name = attention.cache_name(model)
        self._panel: Panel | None = None
        self._room = 0  # Its longest sequence.
        self._layers = list(range(model.config.num_hidden_layers))
        self._queries: dict[int, torch.Tensor] = {}
        self._open, self._between, self._close, self._stop = _frames(tokenizer)

    def ask(self, context: Context, done: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """One line per question. ``done`` has the rows that are known, by question: where none is
        missing, nothing is computed and nothing returned."""
        names = [choice.name for choice in self._choices]
        if len(done) == len(context.questions) and all(
            not row_names or set(names) <= set(row_names) for row_names in done.values()
        ):
            return []
        head = self._ids(self._open + context.text + "\n\n")
        self._stock = DynamicCache(config=self._model.config)
        self._prepare(len(head))
        assert self._panel is not None
        self._panel.restart()
        self._ids_so_far: list[int] = []
        self._read(head)
        lines = []
        for number, question in enumerate(context.questions):
            base = len(self._ids_so_far)
            lines.append(self._one(context, number, question))
            if context.turns:
                self._read(self._ids(self._between))
            else:
                self._back_to(base)
        return lines

    def _prepare(self, tokens: int) -> None:
        if self._panel is None or self._room < tokens + _QUESTIONS_TOKENS:
            self._panel = None  # Gives its memory back first.
            self._room = tokens + 2 * _QUESTIONS_TOKENS
            self._panel = Panel(self._model, self._choices, self._room)

    def _one(self, context: Context, number: int, question: Question) -> dict[str, Any]:
        asked = self._ids(question.ask + self._close + question.lead)
        self._read(asked[:-1])
        before = len(self._ids_so_far)
        answer = self._full_answer(asked[-1])
        text = self._text(answer.tokens)
        solved = question.solved_by(text)
        line: dict[str, Any] = {
            "kind": context.kind, "seed": context.seed, "question": number, "context_tokens": before,
            "expected": question.expected, "full": text, "solved_by_full": solved,
            # By how much its token is likelier than the next best, for each: near ties are lost to
            # rounding alone.
            "gaps": [round(float(each), 5) for each in answer.gaps()], "rows": {},
        }
        if solved:
            assert self._panel is not None
            self._panel.load(self._stock, before, self._sentence_marks(), self._queries)
            line["rows"] = self._forced_and_free(question, asked[-1], answer)
            self._panel.free_rows()
        # The conversation goes on with full attention's answer.
        self._ids_so_far += [asked[-1], *answer.tokens[:-1]]
        return line

    # ---- Full attention ----------------------------------------------------------------------

    def _read(self, ids: list[int]) -> torch.Tensor:
        """Logits behind the last of ``ids``."""
        attention.listen(self._model, self._layers, self._hear)
        try:
            logits = self._forward(ids)
        finally:
            attention.forget_listener(self._model)
        self._ids_so_far += ids
        return logits

    def _forward(self, ids: list[int]) -> torch.Tensor:
        return self._model(
            torch.tensor([ids]), logits_to_keep=1, **{self._name: self._stock}
        ).logits[0, -1]

    def _hear(self, heard: attention.Heard) -> None:
        last = heard.query[0, :, -OBSERVED_QUERIES:].transpose(0, 1).float()
        self._queries[heard.layer] = last

    def _full_answer(self, last: int) -> _Answer:
        token, tokens, places = last, [], []
        while len(tokens) < self._answer_tokens and token != self._stop:
            places.append(self._forward([token]).log_softmax(-1))
            token = int(places[-1].argmax())
            tokens.append(token)
        return _Answer(tokens, torch.stack(places))

    def _back_to(self, tokens: int) -> None:
        assert self._panel is not None
        for layer in self._stock.layers:
            layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
        del self._ids_so_far[tokens:]
        self._panel.cut(tokens)

    # ---- Selection ---------------------------------------------------------------------------

    def _forced_and_free(
        self, question: Question, last: int, answer: _Answer
    ) -> dict[str, dict[str, Any]]:
        assert self._panel is not None
        rows = self._panel.rows
        fed = [last, *answer.tokens[:-1]]
        logits = torch.cat([
            self._panel.forward(rows, [fed[i : i + _STEP]] * len(rows))
            for i in range(0, len(fed), _STEP)
        ], dim=1)
        found = {}
        own: dict[Row, list[int]] = {}
        for index, row in enumerate(rows):
            selected = logits[index].log_softmax(-1)
            full = answer.log_probabilities
            divergence = (full.exp() * (full - selected)).sum(-1).clamp_min(0)
            best = selected.argmax(-1).tolist()
            agree = [mine == theirs for mine, theirs in zip(best, answer.tokens)]
            text = list(answer.tokens)
            if not all(agree):
                # Up to where it leaves full attention's answer, its own is the same.
                text = [*answer.tokens[: agree.index(False)], best[agree.index(False)]]
                own[row] = text
            found[row.choice.name] = {
                "kl": [round(float(each), 7) for each in divergence], "agree": sum(agree)
            }
            found[row.choice.name]["text"] = text
        self._continue(question, own, len(fed))
        for entry in found.values():
            entry["text"] = self._text(entry["text"])
            entry["solved"] = question.solved_by(entry["text"])
            if entry["agree"] == len(entry["kl"]):
                del entry["text"]  # Full attention's.
        return found

    def _continue(self, question: Question, own: dict[Row, list[int]], forced: int) -> None:
        """Decodes on, freely, what left full attention's answer and can still be right; appends to
        the lists in place."""
        assert self._panel is not None
        for row, text in own.items():
            # Its cache holds the forced tokens: the last question token and len(text) - 1 of its
            # own stay.
            row.cut(row.tokens - forced + len(text))
        while own:
            own = {row: text for row, text in own.items()
                   if len(text) < self._answer_tokens and text[-1] != self._stop
                   and not question.lost_by(self._text(text))}
            if not own:
                return
            rows = list(own)
            logits = self._panel.forward(rows, [own[row][-1:] for row in rows])
            for row, place in zip(rows, logits[:, -1]):
                own[row].append(int(place.argmax()))

    # ---- Text --------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _text(self, tokens: list[int]) -> str:
        kept = [token for token in tokens if token != self._stop]
        return str(self._tokenizer.decode(kept))

    def _sentence_marks(self) -> np.ndarray:
        """[tokens] uint8, 1 where a sentence ends."""
        marks = np.zeros(len(self._ids_so_far), dtype=np.uint8)
        for place, token in enumerate(self._ids_so_far):
            if re.search(r"[.!?]$|\n", self._tokenizer.decode([token])):
                marks[place] = 1
        return marks


def _frames(tokenizer: Any) -> tuple[str, str, str, int]:
    """What stands before the context, between two turns, and between question and answer; and the
    token that ends an answer. By the tokenizer's chat template, or plain text."""
    if not tokenizer.chat_template:
        return "", "\n\n", "\n", tokenizer.eos_token_id
    messages = [{"role": "user", "content": "\x01"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, close = whole.split("\x01")
    again = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "\x02"}, {"role": "user", "content": "\x03"}],
        tokenize=False,
    )
    between = again.split("\x02")[1].split("\x03")[0]
    stop = tokenizer(between, add_special_tokens=False).input_ids[0]
    return before, between, close, stop
