"""The arithmetic generator: right by construction, reproducible, and no held-out question is a training question."""

import re

import pytest

from raysae.data.arithmetic import (
    HELD_OUT_ONE_IN,
    MAX_VALUE,
    TOKEN_PATTERN,
    answer_value,
    generate,
    part_of,
    vocabulary,
)
from raysae.data.duplicates import near_duplicates


@pytest.fixture(scope="module")
def problems():
    return list(generate(1000, seed=0))


def test_every_annotation_evaluates_and_the_last_one_is_the_answer(problems):
    for problem in problems:
        *lines, last = problem.answer.split("\n")
        assert 2 <= problem.n_steps <= 4 and len(lines) == problem.n_steps
        for line in lines:
            (left, operator, right, result, said), *more = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", line)
            assert not more
            assert eval(f"{left}{operator}{right}") == int(result) == int(said)
            assert 2 <= int(result) <= MAX_VALUE
        assert last == f"#### {result}"
        assert answer_value(problem.answer) == problem.value == int(result)


def test_every_number_of_the_question_is_used(problems):
    for problem in problems:
        operands = set(re.findall(r"\d+", " ".join(re.findall(r"<<(.*?)=", problem.answer))))
        assert set(re.findall(r"\d+", problem.question)) <= operands


def test_no_field_of_a_template_is_left_and_no_noun_is_singular(problems):
    for problem in problems:
        assert not re.search(r"[{}]|  |\b[01] ", problem.text)
        assert problem.question.count("?") == 1


def test_same_seed_same_problems_and_other_seeds_others(problems):
    assert list(generate(1000, seed=0)) == problems
    questions = {problem.question for problem in problems}
    assert len(questions) == 1000
    assert len(questions & {problem.question for problem in generate(1000, seed=1)}) < 10


def test_a_longer_draw_begins_with_the_shorter_one(problems):
    assert list(generate(100, seed=0)) == problems[:100]


def test_held_out_questions_are_never_training_questions():
    train = {problem.question for problem in generate(2000, seed=0, part="train")}
    held_out = {problem.question for seed in (0, 1) for problem in generate(300, seed, part="held_out")}
    assert not train & held_out
    assert {part_of(question) for question in train} == {"train"}
    assert {part_of(question) for question in held_out} == {"held_out"}


def test_held_out_part_has_its_share(problems):
    share = sum(part_of(problem.question) == "held_out" for problem in problems) / len(problems)
    assert share == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.04)


def test_vocabulary_is_closed(problems):
    words = vocabulary()
    assert len(words) == len(set(words))
    assert {token for problem in problems for token in re.findall(TOKEN_PATTERN, problem.text)} <= set(words)


def test_problems_fit_a_context_of_128(problems):
    assert max(len(re.findall(TOKEN_PATTERN, problem.text)) for problem in problems) + 2 <= 128


def test_near_duplicates_are_rare(problems):
    groups = near_duplicates([problem.question for problem in problems[:500]], 0.8).groups
    assert len({*groups}) >= 470


@pytest.mark.parametrize("text, value", [("a\n#### 12", 12), ("#### -3", -3), ("#### 4\n#### 5", 4), ("12", None)])
def test_answer_value(text, value):
    assert answer_value(text) == value
