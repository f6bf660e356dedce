"""Arithmetic word problems in GSM8K's answer format, made here, so that the default sweep downloads nothing.

A problem is an opening (how many there are), events (gain, lose, multiply) and an ending (what is asked: how many now,
how many each, how many boxes, how many coins), each with its own wording, names, objects and order. Its solution takes
2-4 steps, a line and one `<<a+b=c>>c` each, and ends with `#### c`. Numbers stay small, so that a model of some 200,000
parameters can learn every fact; which numbers to combine, and how, must still be read out of the text.

Solutions are correct by construction, and text and vocabulary come from the same tables. A hash of the question divides
all problems into parts: a `held_out` problem is never a `train` problem, whatever the seeds and the amounts.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

Part = Literal["any", "train", "held_out"]

MAX_VALUE = 40
"""Largest number in a problem. The smallest is 2, so that every noun is a plural."""
HELD_OUT_ONE_IN = 8
"""One question in so many belongs to the held-out part."""
TOKEN_PATTERN = r"[A-Za-z]+|[0-9]+|<<|>>|####|\n|[^\sA-Za-z0-9]"
"""One token of the closed vocabulary."""

NAMES = (  # noqa: SIM905
    "Ada Ben Cleo Dan Emma Finn Gita Hugo Ines Jack Kira Liam Mia Noah Olga Paul Quinn Rosa Sam Tara Uma Vera Will Zoe"
).split()
OBJECTS = (  # noqa: SIM905
    "apples beads books buttons candles cards cookies eggs flowers lemons marbles muffins nuts pears pencils plums "
    "ribbons roses shells stamps stars stickers stones toys"
).split()
CONTAINERS = "bags baskets bowls boxes crates drawers jars trays".split()  # noqa: SIM905
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
COLOURS = "red blue green white".split()  # noqa: SIM905

_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if a % b == 0 else -1,
}


def generate(n: int, seed: int, part: Part = "any") -> Iterator[ArithmeticProblem]:
    """Yield `n` problems with distinct questions; the same arguments give the same problems.

    Two seeds give nearly disjoint problems. `part` makes it a guarantee: `train` and `held_out` share no question.
    """
    rng = random.Random(f"arithmetic/{seed}/{part}")
    seen: set[int] = set()
    while len(seen) < n:
        problem = _draw_problem(rng)
        if problem is None:
            continue
        key = _question_hash(problem.question)
        if key in seen or part not in ("any", part_of(problem.question)):
            continue
        seen.add(key)
        yield problem


def part_of(question: str) -> Part:
    """The part that a question belongs to, `train` or `held_out`, from its text alone."""
    return "held_out" if _question_hash(question) % HELD_OUT_ONE_IN == 0 else "train"


def answer_value(text: str) -> int | None:
    """The number after the first `####` of a solution, or None where there is none."""
    found = re.search(r"#### ?(-?[0-9]+)", text)
    return int(found[1]) if found else None


def vocabulary() -> list[str]:
    """Every token (`TOKEN_PATTERN`) that a problem can hold, and all numbers 0..99; sorted words, then numbers."""
    fragments = [*NAMES, *OBJECTS, *CONTAINERS, *DAYS, *COLOURS, "<<+-*/=>>", "####", "\n"]
    for scene in (*OPENINGS, *EVENTS, *ENDINGS):
        for template in (*scene.texts, *scene.questions, *(wording for step in scene.steps for wording in step[1:])):
            fragments += [literal for literal, *_ in Formatter().parse(template)]
    words = {token for fragment in fragments for token in re.findall(TOKEN_PATTERN, fragment)}
    return sorted(words) + [str(number) for number in range(100)]


def _question_hash(question: str) -> int:
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big")


def _draw_problem(rng: random.Random) -> ArithmeticProblem | None:
    """One random problem, or None where the drawn structure has no room for its events or finds no fitting numbers."""
    opening, ending = rng.choice(OPENINGS), rng.choice(ENDINGS)
    n_events = rng.randint(2, 4) - len(opening.steps) - len(ending.steps)
    if n_events < 0:
        return None
    scenes = [opening, *(rng.choice(EVENTS) for _ in range(n_events)), ending]
    words: dict[str, Any] = {"o": rng.choice(OBJECTS), "box": rng.choice(CONTAINERS)}
    words["A"], words["B"] = rng.sample(NAMES, 2)
    words["day"], words["next"] = rng.sample(DAYS, 2)
    words["colour"], words["other"] = rng.sample(COLOURS, 2)
    told = next((told for told in (_tell(scenes, words, rng) for _ in range(8)) if told is not None), None)
    if told is None:
        return None
    sentences, steps, value = told
    question = rng.choice(ending.questions).format(**words)
    question_first = rng.random() < 0.2
    sentences = [question, *sentences] if question_first else [*sentences, question]
    return ArithmeticProblem(
        question=" ".join(sentences),
        answer="\n".join([*steps, f"#### {value}"]),
        n_steps=len(steps),
        meta={"template": "/".join(scene.name for scene in scenes), "question_first": question_first},
    )


def _tell(scenes: list[Scene], words: dict[str, Any], rng: random.Random) -> tuple[list[str], list[str], int] | None:
    """Sentences, solution lines and the final value of a story with fresh numbers; None if a number is out of range."""
    sentences, lines, value = [], [], 0
    for scene in scenes:
        numbers = {name: rng.randint(low, high) for name, (low, high) in scene.draws.items()}
        text = rng.choice(scene.texts).format(**words, **numbers) if scene.texts else ""
        sentences += [text] if text else []
        numbers = {"v": value} | numbers
        for expression, *wordings in scene.steps:
            left, operator, right = numbers[expression[0]], expression[1], numbers[expression[2]]
            result = _OPERATIONS[operator](left, right)
            if not 2 <= result <= MAX_VALUE:
                return None
            equation = f"<<{left}{operator}{right}={result}>>{result}"
            lines.append(rng.choice(wordings).format(eq=equation, **words, **numbers))
            numbers["v"] = result
        value = numbers["v"]
    return sentences, lines, value


@dataclass(frozen=True)
class ArithmeticProblem:
    """A problem, and its solution in GSM8K's format: a line per step with `<<a+b=c>>`, then `#### value`."""

    question: str
    answer: str
    n_steps: int
    meta: dict[str, Any]

    @property
    def value(self) -> int:
        """The final answer."""
        return int(self.answer.rpartition("#### ")[2])

    @property
    def text(self) -> str:
        """Question and solution, as a model reads them."""
        return f"{self.question}\n{self.answer}"


@dataclass(frozen=True)
class Scene:
    """A part of a story: how it is told, its numbers, and the steps that solve it.

    `v` is the number so far. A step is an expression such as `v+n`, whose result becomes `v`, and its wordings.
    Fields of the texts: `A` the hero, `B` another, `o` objects, `box` containers, `day`, `next`, `colour`, `other`;
    in wordings also `eq`, the annotated equation with its result.
    """

    name: str
    texts: tuple[str, ...]
    draws: dict[str, tuple[int, int]] = field(default_factory=dict)
    steps: tuple[tuple[str, ...], ...] = ()
    questions: tuple[str, ...] = ()


OPENINGS = (
    Scene(
        "have",
        (
            "{A} has {v} {o}.",
            "There are {v} {o} on the table of {A}.",
            "{A} starts with {v} {o}.",
            "On {day} {A} owns {v} {o}.",
            "{B} gives {v} {o} to {A}.",
        ),
        {"v": (5, 30)},
    ),
    Scene(
        "groups",
        (
            "{A} has {a} {box} with {b} {o} in each.",
            "{A} buys {a} {box}, and each of the {box} holds {b} {o}.",
            "On {day} {A} fills {a} {box} with {b} {o} each.",
            "There are {a} {box} in the room of {A} with {b} {o} in each.",
        ),
        {"a": (2, 9), "b": (2, 9)},
        (("a*b", "The {box} hold {eq} {o}.", "{A} has {eq} {o}.", "There are {eq} {o} in the {box}."),),
    ),
    Scene(
        "colours",
        (
            "{A} has {a} {colour} {o} and {b} {other} {o}.",
            "{A} finds {a} {colour} and {b} {other} {o}.",
            "There are {a} {colour} and {b} {other} {o} in the bag of {A}.",
        ),
        {"a": (3, 20), "b": (2, 9)},
        (("a+b", "{A} has {eq} {o}.", "There are {eq} {o} of both colours."),),
    ),
    Scene(
        "more",
        (
            "{B} has {a} {o}. {A} has {b} more {o} than {B}.",
            "{A} has {b} more {o} than {B}, who has {a} {o}.",
            "{B} owns {a} {o}, and {A} owns {b} more.",
        ),
        {"a": (3, 20), "b": (2, 9)},
        (("a+b", "{A} has {eq} {o}.", "{A} owns {eq} {o}."),),
    ),
    Scene(
        "fewer",
        (
            "{B} has {a} {o}. {A} has {b} fewer {o} than {B}.",
            "{A} has {b} fewer {o} than {B}, who has {a} {o}.",
            "{B} owns {a} {o}, and {A} owns {b} fewer.",
        ),
        {"a": (6, 30), "b": (2, 9)},
        (("a-b", "{A} has {eq} {o}.", "{A} owns {eq} {o}."),),
    ),
    Scene(
        "join",
        (
            "{B} has {a} {o}. {A} has {b} times as many {o} as {B}. Then {B} gives all of them to {A}.",
            "{A} has {b} times as many {o} as {B}, who has {a} {o}. {A} gets all the {o} of {B}.",
        ),
        {"a": (2, 9), "b": (2, 5)},
        (("a*b", "{A} has {eq} {o}.", "At first {A} has {eq} {o}."), ("v+a", "With all the {o} {A} has {eq}.")),
    ),
    Scene(
        "days",
        (
            "On {day} {A} picks {a} {o}. On {next} {A} picks {b} more {o} than on {day}.",
            "{A} collects {a} {o} on {day}, and on {next} {b} more than on {day}.",
        ),
        {"a": (3, 20), "b": (2, 9)},
        (
            ("a+b", "On {next} {A} gets {eq} {o}.", "{next} brings {eq} {o}."),
            ("v+a", "Both days bring {eq} {o}.", "On both days {A} gets {eq} {o}."),
        ),
    ),
)

EVENTS = (
    Scene(
        "gain",
        (
            "{A} buys {n} more {o}.",
            "Then {A} finds {n} more {o}.",
            "A present from {B} adds {n} {o}.",
            "{A} gets {n} more {o} from {B}.",
            "Later {n} new {o} arrive.",
            "Another {n} {o} come from a friend.",
        ),
        {"n": (2, 9)},
        (("v+n", "{A} has {eq} {o}.", "Now there are {eq} {o}.", "That makes {eq} {o}."),),
    ),
    Scene(
        "lose",
        (
            "{A} gives {n} {o} to {B}.",
            "Then {A} loses {n} of the {o}.",
            "{B} takes {n} {o} away.",
            "Sadly {n} of the {o} break.",
            "{A} uses {n} {o} at school.",
            "A friend borrows {n} {o} from {A}.",
        ),
        {"n": (2, 9)},
        (("v-n", "{A} has {eq} {o} left.", "That leaves {eq} {o}.", "Now there are {eq} {o}."),),
    ),
    Scene(
        "times",
        (
            "A week later {A} has {n} times as many.",
            "Then the number of {o} grows to {n} times what it was.",
            "{B} trades with {A}, who gets {n} {o} for each one.",
        ),
        {"n": (2, 4)},
        (("v*n", "{A} has {eq} {o}.", "Now there are {eq} {o}.", "That makes {eq} {o}."),),
    ),
)

ENDINGS = (
    Scene(
        "now",
        (),
        questions=(
            "How many {o} does {A} have now?",
            "How many {o} does {A} have in the end?",
            "What is the number of {o} that {A} has after all this?",
        ),
    ),
    Scene(
        "share",
        (
            "{A} shares the {o} equally among {n} friends.",
            "{A} invites {n} friends and splits all the {o} equally among them.",
            "In the end {n} children share the {o} of {A} equally.",
        ),
        {"n": (2, 9)},
        (("v/n", "Each gets {eq} {o}.", "Everyone gets {eq} {o}."),),
        ("How many {o} does each child get?", "How many {o} are there for everyone?", "What does each of them get?"),
    ),
    Scene(
        "pack",
        (
            "{A} packs the {o} in {box} of {n}.",
            "{A} puts {n} {o} in each of some {box} until none are left.",
            "All the {o} go in {box} that hold {n} each.",
        ),
        {"n": (2, 9)},
        (("v/n", "{A} needs {eq} {box}.", "The {o} fill {eq} {box}."),),
        ("How many {box} does {A} need?", "How many {box} are there?", "What number of {box} does {A} fill?"),
    ),
    Scene(
        "sell",
        (
            "{A} sells all the {o} for {n} coins each.",
            "At the market {B} pays {n} coins for each of the {o}.",
            "{B} buys all of the {o} from {A} and pays {n} coins for each.",
        ),
        {"n": (2, 6)},
        (("v*n", "{A} earns {eq} coins.", "The {o} bring {eq} coins."),),
        ("How many coins does {A} earn?", "How many coins does {A} get for the {o}?"),
    ),
    Scene(
        "spend",
        (
            "{A} sells all the {o} for {n} coins each and spends {m} coins.",
            "{B} pays {n} coins for each of the {o}, and {A} spends {m} of the coins on {day}.",
        ),
        {"n": (2, 6), "m": (2, 9)},
        (
            ("v*n", "{A} earns {eq} coins.", "The {o} bring {eq} coins."),
            ("v-m", "{A} has {eq} coins left.", "That leaves {eq} coins."),
        ),
        ("How many coins does {A} have left?", "How many coins are left?"),
    ),
)
