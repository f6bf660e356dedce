"""Train, validation and test by group, with near-duplicates in one group.

A split by row lets a reworded copy of a training problem into the test set, and every measurement after it is too good.
So examples that share most of their word 3-grams are united first, and groups go whole to one split. Numbers count as
words: two problems of one template with different numbers are different problems.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from raysae.data.records import Problem
from raysae.errors import UserError

SPLITS = ("train", "validation", "test")
WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+")
NUM_PERM = 64
MISS_PROBABILITY = 1e-3
"""Chance at most that a pair just at the threshold is not compared; pairs more alike are missed less often."""


def near_duplicate_groups(texts: Sequence[str], threshold: float) -> list[int]:
    """Unite texts whose Jaccard similarity of word 3-grams is at least `threshold`, and whatever they are similar to.

    Candidates come from MinHash LSH and are verified on the exact sets, so no pair is united by a hash collision.
    Returns, for each text, the index of the first text of its group. Cost grows with the candidate pairs, not with all
    pairs.
    """
    from datasketch import MinHash, MinHashLSH  # loads half of SciPy, which model hosts need not

    parent = list(range(len(texts)))
    first_with: dict[frozenset[tuple[str, ...]], int] = {}
    for index, text in enumerate(texts):  # equal sets need no hashing, and many equal texts would make many pairs
        parent[index] = first_with.setdefault(_shingles(text), index)

    shingles = {index: key for key, index in first_with.items()}
    hashes = MinHash.bulk(
        [[" ".join(shingle).encode() for shingle in key] for key in shingles.values()], num_perm=NUM_PERM
    )
    lsh = MinHashLSH(num_perm=NUM_PERM, params=_bands(threshold))
    for (index, mine), minhash in zip(shingles.items(), hashes, strict=True):
        for other in lsh.query(minhash):
            root, other_root = _root(parent, index), _root(parent, other)
            if root != other_root and _jaccard(mine, shingles[other]) >= threshold:
                parent[max(root, other_root)] = min(root, other_root)
        lsh.insert(index, minhash, check_duplication=False)
    return [_root(parent, index) for index in range(len(texts))]


def assign_splits(
    problems: Sequence[Problem],
    validation_fraction: float,
    test_fraction: float,
    threshold: float | None,
    seed: int,
) -> list[Problem]:
    """Give each problem its split; the order stays.

    Groups that hold near-duplicate questions (for corpora: texts) become one group, named after its first member's;
    `threshold=None` leaves groups as given. Groups are drawn in an order that depends on the seed and their texts, not
    on their place in the file. Fractions are of examples, met as closely as whole groups allow; no split is empty.
    Raises UserError where there are fewer groups than splits.
    """
    united = _unite(problems, threshold)
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(united):
        members[name].append(index)
    if len(members) < len(SPLITS):
        raise UserError(
            f"data.validation_fraction: {len(problems)} examples form {len(members)} group(s), and train, validation "
            f"and test need one each; give more examples or raise data.near_duplicate_similarity ({threshold})"
        )

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
    of = texts if threshold is None else near_duplicate_groups(texts, threshold)
    known = {*of[: len(others)]}
    return [p for p, group in zip(problems, of[len(others) :], strict=True) if group not in known]


def _unite(problems: Sequence[Problem], threshold: float | None) -> list[str]:
    """The group of each problem: the given one, joined with those of its near-duplicates."""
    if threshold is None:
        return [problem.group for problem in problems]
    parent = near_duplicate_groups([problem.question for problem in problems], threshold)
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


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Word 3-grams, lower case; a shorter text is one shingle."""
    words = WORD.findall(text.lower())
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def _jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def _bands(threshold: float) -> tuple[int, int]:
    """LSH bands and rows per band: the longest rows (fewest false candidates) that keep `MISS_PROBABILITY`.

    A pair of similarity s shares no band with probability (1 - s^rows)^bands.
    """
    rows = 1
    while rows < NUM_PERM // 2 and (1 - threshold ** (rows + 1)) ** (NUM_PERM // (rows + 1)) <= MISS_PROBABILITY:
        rows += 1
    return NUM_PERM // rows, rows
