"""Instances of the tasks, made from a seed: a context, questions about it, and what answers them.

After the forms of RULER (needle, several keys, variable tracking, common words) and SCBench (key and
value retrieval, several questions about one context). The texts are made here; the filler is the
public-domain novel that ships with kvtier.demo.

A kind is one function ``(random, filler, words) -> Context``; register it in ``KINDS``.
"""

from __future__ import annotations

import dataclasses
import gzip
import random
import re
from collections.abc import Callable
from pathlib import Path

NOVEL = Path(__file__).resolve().parents[2] / "runtime/python/kvtier/demo/emma.txt.gz"

THINGS = (
    "lantern kettle ladder violin anchor basket compass curtain feather hammer helmet jacket "
    "marble mirror needle pillow ribbon saddle shovel spoon statue tunnel wagon whistle candle "
    "bottle carpet drawer engine fiddle"
).split()
COLOURS = "red blue green yellow black white silver golden purple brown".split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Dublin Lisbon Athens Oslo Cairo Tokyo Boston Chicago "
    "Denver Dallas Seattle Toronto Moscow Sydney"
).split()
COMMON = (
    "apple river stone cloud horse table bread chair glass paper tiger lemon music plant shirt "
    "watch grape knife mouse ocean piano queen robot sugar train uncle water zebra beach dance "
    "eagle field ghost house island jewel lake money north onion"
).split()


@dataclasses.dataclass(frozen=True)
class Question:
    """``lead`` begins the answer, so that what follows is the fact and nothing else. Solved where
    the first word or number that follows is ``expected``."""

    ask: str
    lead: str
    expected: str

    def solved_by(self, text: str) -> bool:
        found = re.findall(r"[A-Za-z0-9]+", text)
        return bool(found) and found[0] == self.expected

    def lost_by(self, text: str) -> bool:
        """Whether nothing that follows ``text`` can solve it any more."""
        found = re.findall(r"[A-Za-z0-9]+", text)
        return bool(found) and not self.expected.startswith(found[0])


@dataclasses.dataclass(frozen=True)
class Context:
    kind: str
    seed: int
    text: str
    questions: tuple[Question, ...]
    # Whether a question is asked after the answers to those before it, in one conversation.
    turns: bool = False


class Filler:
    """Sentences of the novel, as many as wanted, from a place that the seed chooses."""

    def __init__(self) -> None:
        text = gzip.decompress(NOVEL.read_bytes()).decode()
        # The planted facts of the demo's text would compete with ours.
        sentences = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
        self._sentences = [each for each in sentences if "magic number" not in each]

    def take(self, random: random.Random, words: int) -> list[str]:
        begin = random.randrange(len(self._sentences))
        taken: list[str] = []
        count = 0
        while count < words:
            sentence = self._sentences[(begin + len(taken)) % len(self._sentences)]
            taken.append(sentence)
            count += len(sentence.split())
        return taken


def _planted(random: random.Random, sentences: list[str], facts: list[str]) -> str:
    """The facts in their order, at places spread evenly with some play."""
    text = list(sentences)
    for number in reversed(range(len(facts))):
        low = len(sentences) * number // len(facts)
        high = max(len(sentences) * (number + 1) // len(facts), low + 1)
        text.insert(random.randrange(low, high), facts[number])
    return " ".join(text)


def _numbers(random: random.Random, count: int) -> list[str]:
    return [str(number) for number in random.sample(range(1000, 10000), count)]


def _needles(random: random.Random, count: int) -> tuple[list[str], list[Question]]:
    names = [f"{colour} {thing}" for colour, thing in
             zip(random.sample(COLOURS, count), random.sample(THINGS, count))]
    facts, questions = [], []
    for name, number in zip(names, _numbers(random, count)):
        facts.append(f"The special magic number for the {name} is {number}.")
        questions.append(Question(
            f"What is the special magic number for the {name} mentioned in the text?",
            f"The special magic number for the {name} mentioned in the text is",
            number,
        ))
    return facts, questions


def needle(random: random.Random, filler: Filler, words: int) -> Context:
    facts, questions = _needles(random, 1)
    text = _planted(random, filler.take(random, words), facts)
    return Context("needle", 0, text, tuple(questions))


def multi_key(random: random.Random, filler: Filler, words: int) -> Context:
    facts, questions = _needles(random, 8)
    text = _planted(random, filler.take(random, words), facts)
    return Context("multi-key", 0, text, tuple(questions))


def turns(random: random.Random, filler: Filler, words: int) -> Context:
    """Each question asks for another sort of thing, so that the answer before does not fit."""
    numbered, sent, painted, opened = random.sample(THINGS, 4)
    number = _numbers(random, 1)[0]
    city, colour, key = (random.choice(names) for names in (CITIES, COLOURS, COMMON))
    asked = [
        (f"The special magic number for the {numbered} is", "is the special magic number for the "
         f"{numbered}", number),
        (f"The {sent} was sent by ship to", f"was the place to which the {sent} was sent by ship",
         city),
        (f"The {painted} was then painted", f"was the colour in which the {painted} was painted",
         colour),
        (f"The secret password of the {opened} is", f"is the secret password of the {opened}", key),
    ]
    questions = [Question(f"What {ask} in the text?", fact, told) for fact, ask, told in asked]
    facts = [f"{fact} {told}." for fact, _, told in random.sample(asked, 4)]
    text = _planted(random, filler.take(random, words), facts)
    order = random.sample(range(4), 4)
    return Context("turns", 0, text, tuple(questions[i] for i in order), turns=True)


def key_value(random: random.Random, filler: Filler, words: int) -> Context:
    """A dense list of pairs inside the prose, which only their keys tell apart."""
    pairs = 16
    names = random.sample(THINGS, pairs)
    values = _numbers(random, pairs)
    rows = " ".join(f"Key {name} has value {value}." for name, value in zip(names, values))
    questions = [
        Question(f"Which value has key {names[i]} in the text?", f"Key {names[i]} has value",
                 values[i])
        for i in random.sample(range(pairs), 8)
    ]
    text = _planted(random, filler.take(random, words), [rows])
    return Context("key-value", 0, text, tuple(questions))


def variables(random: random.Random, filler: Filler, words: int) -> Context:
    """Chains of two: what the second is follows from what the first is. The answer begins with the
    first step; a small model takes none of the two by itself."""
    names = random.sample(THINGS, 8)
    facts, questions = [], []
    for chain, number in enumerate(_numbers(random, 4)):
        first, second = names[2 * chain : 2 * chain + 2]
        same = f"The {second} has the same special magic number as the {first}"
        facts += [f"The special magic number for the {first} is {number}.", f"{same}."]
        questions.append(Question(
            f"What is the special magic number for the {second} mentioned in the text?",
            f"{same}, and the special magic number for the {first} is",
            number,
        ))
    text = _planted(random, filler.take(random, words), facts)
    return Context("variables", 0, text, tuple(questions))


def common_words(random: random.Random, filler: Filler, words: int) -> Context:
    """One word comes every fourth place, the others are drawn evenly."""
    common, *others = random.sample(COMMON, len(COMMON))
    listed = [common if i % 4 == 1 else random.choice(others) for i in range(int(words * 0.25))]
    text = " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))
    question = Question(
        "Which word appears most often in the numbered list above?",
        "The word that appears most often in the list is",
        common,
    )
    return Context("common-words", 0, text, (question,))


KINDS: dict[str, Callable[[random.Random, Filler, int], Context]] = {
    "needle": needle,
    "multi-key": multi_key,
    "key-value": key_value,
    "variables": variables,
    "common-words": common_words,
    "turns": turns,
}


def make(kind: str, seed: int, words: int, filler: Filler) -> Context:
    """The same arguments give the same context, in every process."""
    made = KINDS[kind](random.Random(f"{kind} {seed} {words}"), filler, words)
    return dataclasses.replace(made, seed=seed)
