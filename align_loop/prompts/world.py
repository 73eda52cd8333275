"""A small language with a known truth, so that every claim of the loop can be measured.

A prompt asks for a text by six independent demands: its kind, topic, tone, addressee, place, and
last word. Writers (the demonstrations, and the answers that people compare) honour
each demand only with some probability. The **gold reward** of an answer is the share of the six
demands that it honours, in [0, 1]. People's choices come from the gold reward through a
Bradley-Terry coin, so they are noisy as people's are.

Everything here is a pure function of a seed; nothing is downloaded.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, fields

KINDS = "poem letter story speech song riddle ballad memo fable sermon hymn joke".split()
TONES = "happy sad calm angry proud shy bold warm grim merry stern gentle".split()
ADDRESSEES = "mother friend teacher doctor king sister father brother neighbour captain queen uncle".split()
ENDINGS = "love hope joy peace luck care grace faith trust pride rest honour".split()
PLACES = "paris london rome cairo lima oslo berlin madrid athens delhi tokyo sydney".split()
TOPICS = "river mountain garden moon bridge horse lantern castle storm candle violin mirror".split()

# An answer is a function of the demands it honours: no word of it is free. Each slot stands after a marker word of its
# own ("from", "with"), in the prompt and in the answer, so that what is learnt of one slot does not leak into another.
ANSWER = "dear {addressee} , here is a {kind} sounding {tone} from {place} . i remember the {topic} . with {ending} ."
CLAUSES = {
    "topic": "about the {}",
    "tone": "sounding {}",
    "addressee": "to my dear {}",
    "place": "from {}",
    "ending": "closing with {}",
}
OPENINGS = ("write a {kind}", "please give me a {kind}", "i need a {kind}")
# No prompt and no answer has these; judges are asked in them, and goals and system prompts are told apart by them.
OTHER_WORDS = ("A", "B", "Yes", "No", "good", "bad", *(str(number) for number in range(-9, 10)))


@dataclass(frozen=True)
class Demands:
    """What a prompt asks for."""

    kind: str
    topic: str
    tone: str
    addressee: str
    place: str
    ending: str


DEMANDS = tuple(field.name for field in fields(Demands))
CHOICES = dict(zip(DEMANDS, (KINDS, TOPICS, TONES, ADDRESSEES, PLACES, ENDINGS), strict=True))


def vocabulary() -> list[str]:
    """Every word of this language, sorted, without repeats."""
    words = set(OTHER_WORDS)
    words |= {word for choices in CHOICES.values() for word in choices}
    for text in (ANSWER, *CLAUSES.values(), *OPENINGS):
        words |= {w for w in text.split() if not w.startswith("{")}
    return sorted(words)


def draw_demands(rng: random.Random) -> Demands:
    """Six independent demands, uniformly."""
    return Demands(**{name: rng.choice(CHOICES[name]) for name in DEMANDS})


def prompt_text(demands: Demands, rng: random.Random) -> str:
    """The instruction, its clauses in random order."""
    opening = rng.choice(OPENINGS).format(kind=demands.kind)
    clauses = [shape.format(getattr(demands, name)) for name, shape in CLAUSES.items()]
    rng.shuffle(clauses)
    return " ".join([opening, *clauses])


def write_answer(demands: Demands, honour: float, rng: random.Random) -> str:
    """A writer's answer: each demand is honoured with probability ``honour``, else another value is taken."""
    did = {}
    for name in DEMANDS:
        asked = getattr(demands, name)
        others = [value for value in CHOICES[name] if value != asked]
        did[name] = asked if rng.random() < honour else rng.choice(others)
    return compose(Demands(**did))


def compose(demands: Demands) -> str:
    """The answer that honours exactly ``demands``."""
    return ANSWER.format(**asdict(demands))


def honoured(demands: Demands, answer: str) -> dict[str, bool]:
    """Which demands an answer honours; any text can be given, also one that breaks the answer's form.

    Head and ending are read from the first and last sentence, so that repeating every possible word
    somewhere earns nothing. The topic is honoured when the body names it and no other topic.
    """
    sentences = [part.split() for part in answer.split(" .")]
    complete = bool(sentences) and not sentences[-1]  # a text that stops in mid-sentence has no ending
    sentences = [part for part in sentences if part]
    head, body, last = (sentences[:1] or [[]])[0], sentences[1:-1], (sentences[1:] or [[]])[-1]
    topics = {word for part in body for word in part if word in TOPICS}
    return {
        "kind": head[5:7] == ["a", demands.kind],
        "topic": topics == {demands.topic},
        "tone": head[7:9] == ["sounding", demands.tone],
        "addressee": head[:3] == ["dear", demands.addressee, ","],
        "place": head[9:] == ["from", demands.place],
        "ending": complete and last == ["with", demands.ending],
    }


def gold_reward(demands: Demands, answer: str) -> float:
    """The share of the six demands that the answer honours, in [0, 1]."""
    return sum(honoured(demands, answer).values()) / len(DEMANDS)


def prefers_first(gold_first: float, gold_second: float, sharpness: float, rng: random.Random) -> bool:
    """One person's choice by Bradley and Terry (1952): P(first) = sigmoid(sharpness * demands' difference)."""
    difference = (gold_first - gold_second) * len(DEMANDS)
    return rng.random() < 1 / (1 + math.exp(-sharpness * difference))
