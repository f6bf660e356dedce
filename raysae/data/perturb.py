"""Problems in other words: spaces and line breaks, names, numbers. What a latent stands for should not hang on these.

Only the question (of a corpus: the text) is reworded, and its solution left away, since another number would make it wrong;
a causal model reads a question alike with or without what follows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from raysae.data.records import Problem

KINDS = ("whitespace", "names", "numbers")
ORIGINAL = "original"
FEMALE = (  # noqa: SIM905
    "Abby Abigail Ada Ali Alice Allison Alyssa Amanda Amy Andrea Angela Ann Anna Anne Annie Ashley Barbara Bella Bert "
    "Beth Betty Brenda Calvin Carla Carol Caroline Carolyn Carrie Carson Cassandra Catherine Charlotte Cheryl "
    "Christina Cindy Claire Cleo Connie Courtney Cynthia Daisy Dana Debbie Diana Donna Dorothy Elaine Elizabeth Ella "
    "Ellen Emily Emma Erica Eva Fiona Gina Gita Gloria Grace Hannah Heather Helen Hillary Holly Ines Irene Isabella "
    "Jackie Jane Janet Janice Jasmine Javier Jen Jenna Jennifer Jenny Jerome Jessica Jill Joan Joanna Joey Josie Joy "
    "Joyce Judy Julia Julie Karen Kate Katie Kelly Kendra Kim Kimberly Kira Kris Krystal Kylie Laura Lauren Layla "
    "Leah Lilly Lily Linda Lisa Liz Lizzie Lucy Mack Madeline Mandy Marcy Maria Marnie Martha Mary Maya Megan Melanie "
    "Melissa Mia Micah Michelle Mila Molly Monica Nancy Natalia Natalie Ned Nicole Nina Nora Olga Olivia Pam Pamela "
    "Patricia Peggy Rachel Rebecca Reggie Robin Rosa Rose Ruby Ruth Sabrina Sally Samantha Sandra Sandy Sara Sarah "
    "Savannah Shelly Sophia Sophie Stephanie Sue Susan Susie Tanya Tara Tiffany Tina Tonya Tracy Trevor Uma Valerie "
    "Vanessa Vera Veronica Violet Wendy Zoe"
).split()
MALE = (  # noqa: SIM905
    "Aaron Adam Al Alan Albert Alex Andrew Andy Anthony Archie Arthur Ben Benjamin Bill Billy Bob Bobby Brad Brandon Brian "
    "Bruce Bryan Caleb Carl Carlos Charles Charlie Chris Christopher Cody Colin Craig Dan Daniel Danny Dave David Dean "
    "Dennis Derek Don Donald Doug Dylan Ed Eddie Edward Eli Elijah Eric Ethan Evan Felix Finn Frank Fred Gary Gavin "
    "George Gerald Greg Harold Harry Henry Howard Hugo Ian Isaac Ivan Jack Jackson Jacob Jake James Jamie Jason Jeff "
    "Jeffrey Jeremy Jerry Jim Jimmy Joe Joel John Johnny Jonathan Jordan Jose Joseph Josh Joshua Juan Julian Justin Keith "
    "Ken Kenneth Kevin Kyle Larry Leo Leonard Leroy Liam Logan Louis Lucas Luis Luke Marcus Mario Mark Martin Marvin Matt "
    "Matthew Max Michael Mike Milo Mitchell Nathan Nick Nicholas Noah Oliver Oscar Patrick Paul Pedro Peter Phil Philip "
    "Quinn Ralph Randy Ray Raymond Richard Rick Rob Robert Roger Ron Ronald Roy Russell Ryan Sam Samuel Scott Sean "
    "Sebastian Seth Simon Stan Stephen Steve Steven Ted Thomas Tim Timothy Toby Todd Tom Tommy Tony Travis Tyler Victor "
    "Vincent Walter Wayne Will William Zach Zachary"
).split()
WORD = re.compile(r"[A-Z][a-z]+")
WHOLE = re.compile(r"(?<![\w.,])\d+(?!\w|[.,]\d)")
"""A plain integer: no part of a decimal, a number with commas, or a word such as `4th`."""
GAP = re.compile(r"(?<=\S) (?=\S)")
DOUBLED = 0.25
"""Chance that a space within a sentence is doubled; each space after a sentence becomes a line break."""


def kinds_for(problems: Sequence[Problem]) -> tuple[str, ...]:
    """What can be changed: all KINDS in problems, whose answers say that they are such; in texts the whitespace."""
    return KINDS if any(p.answer or p.steps for p in problems) else KINDS[:1]


def name_pools(problems: Sequence[Problem]) -> tuple[tuple[str, ...], ...]:
    """The female and the male first names, of those known here, that these problems hold: no replacement is new to them."""
    words = {word for p in problems for word in WORD.findall(p.question)}
    return tuple(tuple(sorted(words & {*known})) for known in (FEMALE, MALE))


def reword(problem: Problem, kind: str, pools: Sequence[Sequence[str]], seed: int) -> Problem | None:
    """The problem with its question changed in one way, or None where there is nothing of the kind to change.

    names: each name becomes another of its pool, the same one throughout. numbers: each plain integer becomes another of
    as many digits (never 0 or 1, which grammar depends on), the same one throughout. Same arguments, same words.
    """
    rng = random.Random(f"{kind}/{seed}/{problem.example_id}")
    text = problem.question
    changed = {"whitespace": _respace, "names": _rename, "numbers": _renumber}[kind](text, rng, pools)
    return None if changed == text else plain(problem, kind, changed)


def plain(problem: Problem, kind: str, question: str) -> Problem:
    """The question alone, as an example `<example_id>#<kind>`."""
    return replace(problem, example_id=f"{problem.example_id}#{kind}", question=question, steps=(), answer="")


def _respace(text: str, rng: random.Random, pools: Sequence[Sequence[str]]) -> str:
    def gap(match: re.Match[str]) -> str:
        if text[match.start() - 1] in ".?!":
            return "\n"
        return "  " if rng.random() < DOUBLED else " "

    return GAP.sub(gap, text)


def _rename(text: str, rng: random.Random, pools: Sequence[Sequence[str]]) -> str:
    found = list(dict.fromkeys(WORD.findall(text)))
    chosen: dict[str, str] = {}
    for name in found:
        pool = next((p for p in pools if name in p), ())
        free = [other for other in pool if other not in found and other not in chosen.values()]
        if free:
            chosen[name] = rng.choice(free)
    return WORD.sub(lambda match: chosen.get(match[0], match[0]), text)


def _renumber(text: str, rng: random.Random, pools: Sequence[Sequence[str]]) -> str:
    chosen: dict[str, str] = {}
    for number in dict.fromkeys(WHOLE.findall(text)):
        if int(number) > 1 and number[0] != "0":
            low = max(2, 10 ** (len(number) - 1))
            value = rng.randrange(low, 10 ** len(number) - 1)
            chosen[number] = str(value + (value >= int(number)))  # any but itself
    return WHOLE.sub(lambda match: chosen.get(match[0], match[0]), text)
