"""tools/tasks: what it asks, and that a row of its panel decodes what a TieredCache would."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import CACHE, llama, torch, transformers

from kvtier.transformers import TieredCache

TASKS = Path(__file__).resolve().parents[2] / "tools" / "tasks"
sys.path.insert(0, str(TASKS))

import asking  # noqa: E402
import instances  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402
from panel import Choice  # noqa: E402

WORDS = 120


class Letters:
    """A tokenizer of one token per character, which tells little of the text."""

    chat_template = None
    eos_token_id = 2

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[3 + ord(each) % 90 for each in text])

    def decode(self, ids):
        return "".join(chr(32 + each) for each in ids)


@pytest.mark.parametrize("kind", instances.KINDS)
def test_a_seed_makes_one_context_that_holds_its_answers(kind):
    filler = instances.Filler()
    made = instances.make(kind, 3, WORDS, filler)
    assert made == instances.make(kind, 3, WORDS, instances.Filler())
    assert made.text != instances.make(kind, 4, WORDS, filler).text
    assert made.kind == kind and made.questions
    for question in made.questions:
        # As a word of its own, and not in what the question gives away.
        assert question.expected in made.text
        assert question.expected not in question.ask + question.lead
    answers = [question.expected for question in made.questions]
    assert len(set(answers)) == len(answers)


def test_the_most_common_word_is_the_answer():
    made = instances.make("common-words", 5, 800, instances.Filler())
    listed = made.text.split()[1::2]
    counts = sorted({word: listed.count(word) for word in listed}.items(), key=lambda e: -e[1])
    assert counts[0][0] == made.questions[0].expected and counts[0][1] > 2 * counts[1][1]


def test_only_the_first_word_solves():
    question = instances.Question("?", "", "4821")
    assert question.solved_by(" 4821. And") and question.solved_by('"4821"')
    for wrong in ("", " 48211", " 482", " is 4821", " 1248 4821"):
        assert not question.solved_by(wrong)
    assert not question.lost_by(" 48") and not question.lost_by(" ")
    assert question.lost_by(" 49") and question.lost_by(" is 4821")


def attentive(seed=0):
    """A random model whose logits rest on attention."""
    model = llama(seed, max_position_embeddings=2048)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "v_proj" in name or "o_proj" in name or "lm_head" in name:
                weight.mul_(6.0)
    return model


def asked(model, context, choices, done=None):
    with torch.inference_mode():
        return asking.Asker(model, Letters(), choices, 4).ask(context, done or {})


class Anything(instances.Question):
    """Solved by whatever a random model says."""

    def solved_by(self, text):
        return True

    def lost_by(self, text):
        return False


def context_of(turns=False):
    text = "".join(random.Random(1).choices("abcdefgh ijkl. mnop", k=400))
    questions = tuple(Anything(f"question {n} of some length?", "it is", "x") for n in range(3))
    return instances.Context("test", 0, text, questions, turns=turns)


@pytest.mark.parametrize("turns", [False, True])
def test_a_row_that_attends_everything_is_full_attention(turns):
    model = attentive()
    lines = asked(model, context_of(turns), [Choice("scan", 1.0), Choice("recency", 0.2)])
    assert [line["question"] for line in lines] == [0, 1, 2]
    for line in lines:
        whole, recent = line["rows"]["scan 1"], line["rows"]["recency 0.2"]
        assert whole["agree"] == len(whole["kl"]) == 4 and "text" not in whole
        assert max(whole["kl"]) < 1e-4  # What is stored is float16.
        assert max(recent["kl"]) > 1e-3
    lengths = [line["context_tokens"] for line in lines]
    assert (lengths[1] > lengths[0] + 30) == turns


def test_a_row_decodes_what_a_tiered_cache_decodes():
    """Other rows beside it, forks and forced tokens change nothing."""
    model = attentive()
    context = context_of()
    choices = [Choice("mean", 0.3), Choice("scan", 0.25), Choice("mean", 0.25)]
    lines = asked(model, context, choices)
    ids = [3 + ord(each) % 90 for each in context.text + "\n\n"]
    question = [3 + ord(each) % 90 for each in
                context.questions[1].ask + "\n" + context.questions[1].lead]
    with torch.inference_mode(), TieredCache(
        model, tokens_max=len(ids) + 200, device_capacity="100%", budget=0.25, selector="mean",
        dtype="float16", threads=1,
    ) as cache:
        full = transformers.DynamicCache(config=model.config)
        for part in (ids, question[:-1]):
            for each in (cache, full):
                model(torch.tensor([part]), **{CACHE: each})
        token, divergences = question[-1], []
        for _ in range(4):
            selected, exact = (
                model(torch.tensor([[token]]), **{CACHE: each}).logits[0, -1].log_softmax(-1)
                for each in (cache, full))
            divergences.append(float((exact.exp() * (exact - selected)).sum()))
            token = int(exact.argmax())
    found = lines[1]["rows"]["mean 0.25"]["kl"]
    assert max(divergences) > 1e-3
    # The cache's prompt went through attention over float16, the panel's did not.
    assert found == pytest.approx(divergences, rel=0.05, abs=2e-4)


def test_what_left_the_answer_goes_on_as_its_own():
    """Free decoding of a row equals free decoding with nothing else in the panel."""
    model, context = attentive(), context_of()
    alone = asked(model, context, [Choice("recency", 0.2)])
    beside = asked(model, context, [Choice("random", 0.2), Choice("recency", 0.2)])
    texts = [line["rows"]["recency 0.2"].get("text") for line in alone]
    assert texts == [line["rows"]["recency 0.2"].get("text") for line in beside]
    assert any(text is not None and len(text) == 4 for text in texts)


def test_an_interrupted_run_goes_on(tmp_path):
    path, header = tmp_path / "results.jsonl", {"model": "a"}
    assert run.resume(path, header) == {}
    lines = asked(attentive(), context_of(), [Choice("recency", 0.2)])
    with path.open("a") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
        file.write('{"kind": "te')
    done = run.resume(path, header)
    assert len(path.read_text().splitlines()) == 4
    known = done[("test", 0)]
    assert set(known) == {0, 1, 2}
    # Nothing is missing, so the model is not even asked.
    assert asked(attentive(), context_of(), [Choice("recency", 0.2)], known) == []
    with pytest.raises(SystemExit, match="another model"):
        run.resume(path, {"model": "b"})


def test_the_table_counts_what_full_attention_solved(tmp_path, capsys, monkeypatch):
    path = tmp_path / "results.jsonl"
    lines = [
        {"kind": "needle", "seed": n, "question": 0, "context_tokens": 9, "solved_by_full": n < 3,
         "rows": {"scan 0.1": {"kl": [0.1, 0.3], "agree": 1, "solved": n != 1}} if n < 3 else {}}
        for n in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, [{"model": "a", "default_selector": "scan"}, *lines])))
    monkeypatch.setattr(sys, "argv", ["table.py", str(path)])
    table.main()
    shown = capsys.readouterr().out
    assert "| needle | 4 | 9 - 9 | 4 | 3 | 2 / 3 |" in shown
    assert "| `scan` (default) | 2 / 3, 0.2, 0.3, 0.500 |" in shown
