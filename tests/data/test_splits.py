"""No group, and no near-duplicate, lies in two splits."""

import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache

import pytest

from raysae.data.records import make_problem
from raysae.data.sources import load_problems
from raysae.data.splits import SPLITS, assign_splits, near_duplicate_groups, unseen
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


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_groups_are_the_connected_components_of_the_exact_similarity(threshold):
    texts = texts_with_copies(1, originals=25)
    expected = list(range(len(texts)))
    for i, a in enumerate(texts):
        for j in range(i):
            if similarity(a, texts[j]) >= threshold and expected[i] != expected[j]:
                low, high = sorted((expected[i], expected[j]))
                expected = [low if group == high else group for group in expected]
    assert near_duplicate_groups(texts, threshold) == expected


def test_numbers_and_short_texts_are_told_apart():
    template = "{} has {} apples and {} pears and gives {} of them to a friend who has {} already"
    assert near_duplicate_groups([template.format("Ann", *[n] * 4) for n in (3, 4)], 0.8) == [0, 1]
    assert near_duplicate_groups(["a b", "a b", "a c", "", " "], 0.8) == [0, 0, 2, 3, 3]


def test_near_duplicates_and_groups_stay_together():
    texts = texts_with_copies(2)
    problems = [make_problem(f"p/{i}", "p", text, group=f"g{i // 2}") for i, text in enumerate(texts)]
    assigned = assign_splits(problems, 0.15, 0.15, 0.8, seed=0)
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
    assigned = assign_splits(problems, 0.1, 0.2, 0.8, seed=0)
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


def test_too_few_groups_is_the_users_mistake():
    problems = [make_problem(f"d/{i}", "d", "the same text in every row") for i in range(20)]
    with pytest.raises(UserError, match=r"data.validation_fraction: 20 examples form 1 group"):
        assign_splits(problems, 0.1, 0.1, 0.8, seed=0)
    assert len({p.split for p in assign_splits(problems, 0.1, 0.1, None, seed=0)}) == 3


def test_what_is_near_to_known_examples_is_not_unseen():
    base, far = " ".join(WORDS[:40]), " ".join(WORDS[40:80])
    near = f"{' '.join(WORDS[:39])} changed"
    assert similarity(base, near) > 0.9
    known = [make_problem("k/0", "k", "something else"), make_problem("k/1", "k", base)]
    others = [make_problem(name, "o", text) for name, text in (("far", far), ("same", base), ("near", near))]
    assert [p.example_id for p in unseen(others, known, 0.8)] == ["far"]
    assert [p.example_id for p in unseen(others, known, None)] == ["far", "near"]
