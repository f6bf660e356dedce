"""Rewording changes what it says it changes, and nothing else."""

from __future__ import annotations

import re

import pytest

from raysae.data.arithmetic import NAMES
from raysae.data.perturb import FEMALE, KINDS, MALE, kinds_for, name_pools, reword
from raysae.data.records import make_problem, render
from raysae.data.sources import load_problems

TEXT = "Anna has 12 apples and 3.5 pears. On the 4th day Anna gives 12 to Ben. Ben, who had 1, pays $1,200 for 07."


def problem(text=TEXT, **more):
    return make_problem("toy/1", "toy", text, answer="Anna has <<12+1=13>>13\n#### 13", **more)


POOLS = name_pools([problem(), problem("Mia and Zoe met Sam and Noah.")])


def test_names_change_throughout_and_stay_in_the_corpus():
    changed = reword(problem(), "names", POOLS, 0).question
    anna, ben = re.findall(r"(\w+) has 12.*to (\w+)\. ", changed)[0]
    assert anna in {"Mia", "Zoe"} and ben in {"Sam", "Noah"}
    assert changed == TEXT.replace("Anna", anna).replace("Ben", ben)


def test_two_people_stay_two():
    """A new name is never one that the text has already, nor one that another of its names became."""
    crowd = problem("Mia met Zoe, Zoe met Ada.")
    pools = (("Ada", "Mia", "Uma", "Vera", "Zoe"), ())
    for seed in range(20):
        changed = reword(crowd, "names", pools, seed).question
        words = re.findall(r"[A-Z][a-z]+", changed)
        assert len({*words}) == 3 and {"Uma", "Vera"} <= {*words} and len({*words} & {"Mia", "Zoe", "Ada"}) == 1


def test_numbers_change_throughout_and_keep_their_digits():
    changed = reword(problem(), "numbers", POOLS, 0).question
    (one, two) = re.findall(r"has (\d+) apples.*gives (\d+) to", changed)[0]
    assert one == two != "12" and len(one) == 2
    assert changed == TEXT.replace("12 ", f"{one} ")  # not 3.5, 4th, 1, 1,200 or 07


def test_whitespace_changes_no_word():
    changed = reword(problem(), "whitespace", POOLS, 0).question
    assert changed.split() == TEXT.split() and "  " in changed and changed.count("\n") == 2


def test_the_solution_is_left_away():
    for kind in KINDS:
        made = reword(problem(), kind, POOLS, 0)
        assert render(made)[0] == made.question and made.example_id == f"toy/1#{kind}"


def test_nothing_to_change_is_none_and_the_same_seed_says_the_same():
    assert reword(problem("so it goes"), "names", POOLS, 0) is None
    assert reword(problem("Xerxes has 1 apple"), "names", POOLS, 0) is None
    assert reword(problem("Xerxes has 1 apple"), "numbers", POOLS, 0) is None
    assert reword(problem("word"), "whitespace", POOLS, 0) is None
    many = [[reword(problem(), kind, POOLS, seed).question for seed in range(20)] for kind in KINDS]
    again = [[reword(problem(), kind, POOLS, seed).question for seed in range(20)] for kind in KINDS]
    assert many == again and all(len({*texts}) > 1 for texts in many)


def test_a_text_has_its_whitespace_changed_only():
    assert kinds_for([make_problem("t/1", "t", "Once 12 cats met Anna.")]) == ("whitespace",)
    assert kinds_for([problem()]) == KINDS


def test_the_name_lists_are_apart_and_hold_the_generators():
    assert {*NAMES} <= {*FEMALE, *MALE} and not {*FEMALE} & {*MALE}


def test_generated_problems_all_change():
    problems = load_problems("arithmetic", examples=50)
    pools = name_pools(problems)
    for kind in KINDS:
        for p in problems:
            made = reword(p, kind, pools, 0)
            assert made is not None and made.question != p.question


def test_real_problems_mostly_change(shared):
    problems = load_problems("gsm8k", str(shared / "data/gsm8k/train.jsonl"))[:500]
    pools = name_pools(problems)
    changed = {kind: sum(reword(p, kind, pools, 0) is not None for p in problems) for kind in KINDS}
    assert changed["whitespace"] == 500 and changed["numbers"] > 450 and changed["names"] > 200


@pytest.mark.parametrize("number", ["2", "9", "10", "99", "100"])
def test_a_number_is_never_itself_nor_of_other_length(number):
    for seed in range(200):
        changed = reword(problem(f"has {number} left"), "numbers", POOLS, seed).question.split()[1]
        assert changed != number and len(changed) == len(number) and int(changed) > 1
