"""Near-duplicate texts, found by what they share: their short phrases, or a passage of one in the other.

Two texts are near-duplicates at a threshold t if

- the Jaccard similarity of their *shingles* (runs of 3 words) is at least t: the same text with a word changed; or
- they share at least t / 2 of the shorter one's *passages* (runs of 8 words), and 8 of them: an excerpt of a document, or
  two windows that overlap by half. Jaccard similarity alone is low for these, as the rest of the longer text differs; or
- where it is asked for, they share a given part of the shorter one's shingles, and 4 of them: a rewording.

Numbers count as one and the same word: "plants 3 rose bushes" and "plants 4 rose bushes" are one problem. Scripts without
spaces (Chinese, Japanese, Thai, ...) have a word per character. Where letters are not most of a text (brackets, emoji,
digits, formulas), each character is a word, as it stands, and a shingle is as many of them as tell texts apart.

All pairs are found, none by chance: texts that share enough of their shingles share one of the rarest ones (prefix
filtering, Chaudhuri et al. 2006; Bayardo et al. 2007), which few others have; counts are products of SciPy's sparse
matrices. datasketch's LSH Ensemble takes five times as long, and misses pairs (`benchmarks/near_duplicates.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import regex

SHINGLE, PASSAGE = 3, 8
"""Words in a shingle and in a passage."""
SHARED_PASSAGES = 8
"""Fewest passages that two texts share: 15 words in a row. Shorter runs are phrases."""
SHARED_SHINGLES = 4
"""Fewest shingles that a text shares with a rewording of it."""
SPARE_BITS = 8
"""Information of a shingle of characters beyond what tells the places of the longest text apart: 2^-8 occur by chance."""
PAIRS_AT_ONCE = 20_000_000
"""Candidates (rows of a sparse product) that are held at once; bounds memory."""

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"[[\p{{L}}\p{{M}}_]--[{_UNSPACED}]]"
_WORD = regex.compile(rf"(?V1)\p{{Nd}}+(?:[.,]\p{{Nd}}+)*|[{_UNSPACED}]\p{{M}}*|{_LETTER}(?:{_LETTER}|\p{{Nd}})*")
_NUMBER = "0"


class NearDuplicates(NamedTuple):
    """What was found among some texts."""

    groups: list[int]
    """For each text, the index of the first text of its group."""
    short: int
    """Texts with fewer words or characters than a shingle: only equal ones among them are united."""


def near_duplicates(texts: Sequence[str], threshold: float, contained: float = 1.0) -> NearDuplicates:
    """Unite texts that are near-duplicates at `threshold` (module docstring), and whatever these are near to.

    contained: share of the shorter one's shingles from which two texts are rewordings of each other, below 1 where those
    are asked for: laxer than what a split may unite, since questions of one kind share as much.
    Cost grows with the words, and with the pairs that share rare shingles, not with all pairs.
    """
    from scipy import sparse  # loads half of SciPy, which model hosts need not

    words, length = _words(texts)
    shingles = [_runs(w, n) for w, n in zip(words, length, strict=True)]
    first_with: dict[bytes, int] = {}  # equal sets are not compared: many equal texts would make many pairs
    same = np.array([first_with.setdefault(s.tobytes(), i) for i, s in enumerate(shingles)], dtype=np.int64)
    distinct = np.unique(same)

    edges = [np.stack([same, np.arange(len(texts))])]
    for a, b, shared, sizes in _sharing([shingles[i] for i in distinct], min(threshold, contained)):
        near = shared >= threshold * (sizes[a] + sizes[b] - shared) - 1e-9
        if contained < 1:
            near |= shared >= np.maximum(contained * sizes[a] - 1e-9, SHARED_SHINGLES)
        edges.append(distinct[np.stack([a[near], b[near]])])
    del shingles
    passages = [_runs(words[i], _passage(length[i])) for i in distinct]
    for a, b, shared, _ in _sharing(passages, threshold / 2):
        near = shared >= SHARED_PASSAGES
        edges.append(distinct[np.stack([a[near], b[near]])])

    pairs = np.concatenate(edges, axis=1)
    graph = sparse.coo_matrix((np.ones(pairs.shape[1], bool), pairs), shape=(len(texts), len(texts)))
    of = sparse.csgraph.connected_components(graph, directed=False)[1]
    _, first, group = np.unique(of, return_index=True, return_inverse=True)
    short = sum(len(w) < n for w, n in zip(words, length, strict=True))
    return NearDuplicates(first[group].tolist(), short)


def _words(texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
    """Each text's words (uint64 [words], equal for equal words), and how many of them make a shingle of it."""
    found: list[np.ndarray] = []
    by_character = []
    word_code: dict[str, int] = {}
    character_code: dict[str, int] = {}
    for text in texts:
        text = text.lower()
        words = _WORD.findall(text)
        solid = "".join(text.split())
        others = len(solid) - sum(map(len, words))
        words = [_NUMBER if word[0].isdecimal() else word for word in words]
        in_words = [len(word) for word in words if word != _NUMBER]
        by_character.append(len(in_words) < SHINGLE or sum(in_words) < 2 * others)
        units, code = (solid, character_code) if by_character[-1] else (words, word_code)
        found.append(np.array([code.setdefault(unit, len(code)) for unit in units], dtype=np.int64))
    size = _characters_of_a_shingle([w for w, alone in zip(found, by_character, strict=True) if alone])
    value = np.random.default_rng(0).integers(1, 2**63, size=len(word_code) + len(character_code), dtype=np.uint64)
    valued = [value[w + len(word_code) * alone] for w, alone in zip(found, by_character, strict=True)]
    return valued, [size if alone else SHINGLE for alone in by_character]


def _characters_of_a_shingle(texts: Sequence[np.ndarray]) -> int:
    """As many characters as carry log2(longest text) + SPARE_BITS bits: 3 of many emoji, 16 of two kinds of bracket."""
    longest = max(map(len, texts), default=0)
    if longest == 0:
        return SHINGLE
    count = np.bincount(np.concatenate(texts))
    share = count[count > 0] / count.sum()
    bits = float(-(share * np.log2(share)).sum())
    needed = math.log2(longest) + SPARE_BITS
    return max(SHINGLE, math.ceil(needed / bits)) if bits > needed / longest else longest


def _passage(shingle: int) -> int:
    return PASSAGE if shingle == SHINGLE else 2 * shingle


def _runs(words: np.ndarray, length: int) -> np.ndarray:
    """The distinct runs of `length` words, as sorted hashes uint64; a shorter text is one run."""
    length = min(length, len(words)) or 1
    hashes = np.zeros(max(len(words) - length + 1, 0), dtype=np.uint64)
    for start in range(length):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[start : start + len(hashes)]
    return np.unique(hashes)


def _sharing(
    sets: Sequence[np.ndarray], share: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of sets that share at least `share` of the smaller one's elements, in parts.

    Yields (a, b, elements shared) with a the smaller, and the sizes of all sets. A set's elements are sorted by how many
    sets have them. If a shares `share` of its n elements with b, one of its n - ceil(share n) + 1 rarest is in b.
    """
    from scipy import sparse

    if not sets:
        return
    sizes = np.array([len(s) for s in sets])
    _, element, frequency = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    row = np.repeat(np.arange(len(sets)), sizes)
    order = np.lexsort((element, frequency[element], row))
    element = element[order]
    rank = np.arange(len(element)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rare = rank <= sizes[row] - np.ceil(share * sizes[row] - 1e-9)
    common = frequency[element] > 1  # one that a single set has is in no pair

    def matrix(which: np.ndarray) -> sparse.csr_matrix:
        where = (row[which], element[which])
        return sparse.csr_matrix((np.ones(len(where[0]), np.int32), where), shape=(len(sets), len(frequency)))

    whole, prefix = matrix(common), matrix(common & rare)
    columns = whole.T.tocsr()
    work = np.cumsum(prefix @ frequency)
    start = 0
    while start < len(sets):
        done = work[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(work, done + PAIRS_AT_ONCE, side="right")))
        met = (prefix[start:stop] @ columns).tocoo()
        a, b = met.row + start, met.col
        smaller = (sizes[a] < sizes[b]) | ((sizes[a] == sizes[b]) & (a < b))
        a, b = a[smaller], b[smaller]
        cuts = np.flatnonzero(np.diff(np.cumsum(sizes[a]) // PAIRS_AT_ONCE)) + 1
        for some in np.split(np.arange(len(a)), cuts):
            shared = np.asarray(whole[a[some]].multiply(whole[b[some]]).sum(axis=1)).ravel()
            enough = shared >= share * sizes[a[some]] - 1e-9
            yield a[some][enough], b[some][enough], shared[enough], sizes
        start = stop
