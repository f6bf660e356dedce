"""No group, and no near-duplicate, lies in two splits."""

import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache

import pytest

from raysae.data.duplicates import near_duplicates
from raysae.data.records import make_problem
from raysae.data.sources import load_problems
from raysae.data.splits import SPLITS, assign_splits, unseen
from raysae.errors import UserError

WORDS = [f"w{i}" for i in range(500)]


@cache
def grams(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + 3]) for i in range(len(words) - 2))


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of word 3-grams, written again."""
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def texts_with_copies(seed: int, originals: int = 60) -> list[str]:
    """Random texts, each with copies in which 0 to 8 of 40 words are changed."""
    rng = random.Random(seed)
    texts = []
    for _ in range(originals):
        words = rng.choices(WORDS, k=40)
        for changes in range(9):
            copy = list(words)
            for place in rng.sample(range(40), changes):
                copy[place] = "changed"
            texts.append(" ".join(copy))
    rng.shuffle(texts)
    return texts


def near(problems):
    return near_duplicates([p.question for p in problems], 0.8)


def test_near_duplicates_and_groups_stay_together():
    texts = texts_with_copies(2)
    problems = [make_problem(f"p/{i}", "p", text, group=f"g{i // 2}") for i, text in enumerate(texts)]
    assigned = assign_splits(problems, 0.15, 0.15, near(problems), seed=0)
    assert [p.example_id for p in assigned] == [p.example_id for p in problems]
    splits_of_group = defaultdict(set)
    for before, after in zip(problems, assigned, strict=True):
        splits_of_group[before.group].add(after.split)
        splits_of_group["united " + after.group].add(after.split)
    assert all(len(splits) == 1 for splits in splits_of_group.values())
    for i, a in enumerate(assigned):
        for b in assigned[:i]:
            assert a.split == b.split or similarity(a.question, b.question) < 0.8


def test_gsm8k_is_split_by_fraction_and_by_content(shared):
    problems = load_problems("gsm8k", str(shared / "data/gsm8k/train.jsonl"))
    assigned = assign_splits(problems, 0.1, 0.2, near(problems), seed=0)
    counts = Counter(p.split for p in assigned)
    assert (counts["validation"], counts["test"]) == (747, 1495)
    renamed = [replace(p, group=f"other {row}") for row, p in enumerate(problems[::-1])]
    unshared = {p.question: p.split for p in assign_splits(problems, 0.1, 0.2, None, seed=0)}
    assert {p.question: p.split for p in assign_splits(renamed, 0.1, 0.2, None, seed=0)} == unshared
    assert {p.question: p.split for p in assign_splits(problems, 0.1, 0.2, None, seed=1)} != unshared


@pytest.mark.parametrize("sizes", [[1, 1, 1], [50, 1, 1], [7, 7, 7], [40, 30, 20, 10], [1] * 11])
@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.5, 0.49)])
def test_no_split_is_empty(sizes, fractions):
    problems = [make_problem(f"{g}/{i}", "d", f"{g} {i}", group=str(g)) for g, n in enumerate(sizes) for i in range(n)]
    for seed in range(5):
        assigned = assign_splits(problems, *fractions, None, seed)
        assert {p.split for p in assigned} == set(SPLITS)
        assert len({(p.group, p.split) for p in assigned}) == len(sizes)


def test_too_few_groups_is_the_users_mistake_and_what_helps_is_said():
    def refused(texts, group=None):
        problems = [make_problem(f"d/{i}", "d", text, group=group) for i, text in enumerate(texts)]
        with pytest.raises(UserError) as caught:
            assign_splits(problems, 0.1, 0.1, near(problems), seed=0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    words = [" ".join(random.Random(i).choices(WORDS, k=20)) for i in range(20)]
    sums = [f"What is the sum of {i} and {i + 1}?" for i in range(20)]
    assert re.match(
        r"data\.path: 20 examples form 1 group, .* 1 different texts: give more", refused(["the same"] * 20)
    )
    assert re.match(r"data\.columns\.group: 20 examples form 1 group, .* 1 different", refused(words, group="g"))
    said = refused(sums)
    assert re.match(r"data\.near_duplicate_similarity: 20 examples form 1 group, .*numbers.*null", said)
    assert len({p.split for p in assign_splits([make_problem(t, "d", t) for t in sums], 0.1, 0.1, None, 0)}) == 3


def test_what_is_near_to_known_examples_is_not_unseen():
    base, far = " ".join(WORDS[:40]), " ".join(WORDS[40:80])
    near = f"{' '.join(WORDS[:39])} changed"
    assert similarity(base, near) > 0.9
    known = [make_problem("k/0", "k", "something else"), make_problem("k/1", "k", base)]
    others = [make_problem(name, "o", text) for name, text in (("far", far), ("same", base), ("near", near))]
    assert [p.example_id for p in unseen(others, known, 0.8)] == ["far"]
    assert [p.example_id for p in unseen(others, known, None)] == ["far", "near"]
