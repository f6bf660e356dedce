"""Train, validation and test by group, with near-duplicates in one group.

A split by row lets a reworded copy of a training problem into the test set, and every measurement after it is too good.
So near-duplicates (`duplicates.py`) are united first, and groups go whole to one split.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from raysae.data.duplicates import NearDuplicates, near_duplicates
from raysae.data.records import Problem
from raysae.errors import UserError

SPLITS = ("train", "validation", "test")


def assign_splits(
    problems: Sequence[Problem],
    validation_fraction: float,
    test_fraction: float,
    near: NearDuplicates | None,
    seed: int,
) -> list[Problem]:
    """Give each problem its split; the order stays.

    Groups that hold near-duplicate questions (for corpora: texts) become one group, named after its first member's;
    `near=None` leaves groups as given. Groups are drawn in an order that depends on the seed and their texts, not on
    their place in the file. Fractions are of examples, met as closely as whole groups allow; no split is empty.
    Raises UserError where there are fewer groups than splits.
    """
    united = _unite(problems, near)
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(united):
        members[name].append(index)
    if len(members) < len(SPLITS):
        raise UserError(_too_few(problems, len(members)))

    def draw(name: str) -> tuple[bytes, str]:
        digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
        for text in sorted(problems[index].question for index in members[name]):
            digest.update(hashlib.blake2b(text.encode(), digest_size=16).digest())
        return digest.digest(), name

    targets = {"test": test_fraction * len(problems), "validation": validation_fraction * len(problems)}
    filled = {split: 0 for split in SPLITS}
    split_of: dict[str, str] = {}
    order = sorted(members, key=draw)
    for name in order:
        size = len(members[name])
        # Up to half an example over, as in rounding; a group larger than that goes to train.
        fits = [split for split, target in targets.items() if filled[split] + size <= target + 0.5]
        split_of[name] = fits[0] if fits else "train"
        filled[split_of[name]] += size

    for split in SPLITS:
        if not filled[split]:
            held = list(split_of.values())
            donor = max(SPLITS, key=held.count)
            name = min((n for n in order if split_of[n] == donor), key=lambda n: len(members[n]))
            filled[donor] -= len(members[name])
            filled[split] += len(members[name])
            split_of[name] = split
    return [replace(p, group=name, split=split_of[name]) for p, name in zip(problems, united, strict=True)]


def unseen(problems: Sequence[Problem], others: Sequence[Problem], threshold: float | None) -> list[Problem]:
    """Those of `problems` that are no near-duplicate of any of `others`, by question (`threshold=None`: not the same)."""
    texts = [p.question for p in [*others, *problems]]
    of = texts if threshold is None else near_duplicates(texts, threshold).groups
    known = {*of[: len(others)]}
    return [p for p, group in zip(problems, of[len(others) :], strict=True) if group not in known]


def _too_few(problems: Sequence[Problem], groups: int) -> str:
    """Why there are fewer groups than splits, and what helps."""
    plural = "" if groups == 1 else "s"
    found = f"{len(problems)} examples form {groups} group{plural}, and train, validation and test need one each"
    texts, given = len({p.question for p in problems}), len({p.group for p in problems})
    if texts < len(SPLITS):
        return f"data.path: {found}; there are {texts} different texts: give more"
    if given < len(SPLITS):
        return f"data.columns.group: {found}; the column holds {given} different values"
    return (
        f"data.near_duplicate_similarity: {found}; their texts share most of their words (numbers count as one word), or "
        "long passages: give others, raise it, or set it to null, which splits near-duplicates too"
    )


def _unite(problems: Sequence[Problem], near: NearDuplicates | None) -> list[str]:
    """The group of each problem: the given one, joined with those of its near-duplicates."""
    if near is None:
        return [problem.group for problem in problems]
    parent = list(near.groups)
    first_of: dict[str, int] = {}
    for index, problem in enumerate(problems):
        root, other = _root(parent, index), _root(parent, first_of.setdefault(problem.group, index))
        parent[max(root, other)] = min(root, other)
    return [problems[_root(parent, index)].group for index in range(len(problems))]


def _root(parent: list[int], index: int) -> int:
    """Union-find: the first member of the index's group. Shortens the path on the way."""
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index
