"""Near-duplicates among 100,000 documents: what is found, and what it costs; MinHash beside it on fewer.

    python benchmarks/near_duplicates.py [--documents 100000] [--beside 10000] [--text FILE] [--json FILE]

Documents of 150 to 400 words are walks from word to next word in the words of FILE (TinyStories), so that short phrases
are as frequent as in text, and no two documents are alike. Of every 100 one is an excerpt, 120 words of another; one has
its last 120 words from the first 120 of another's last 240 (windows that overlap by half); one is another with one word
in 40 changed. MinHash is datasketch's LSHEnsemble (containment) over the same passages with their exact check, 128
permutations and 32 parts, at the same threshold. Seconds are of this process (CPU), on one thread.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import common
import numpy as np

from raysae.data import duplicates

SHARED = Path(common.os.environ.get("RAYSAE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
THRESHOLD = 0.8


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--beside", type=int, default=10_000, help="documents that MinHash gets too (default 10,000)")
    parser.add_argument("--text", type=Path, default=SHARED / "data/tinystories_text/tiny_stories.txt")
    args = parser.parse_args()
    load = common.os.getloadavg()[0]
    walks = Walks(re.findall(r"\w+", args.text.read_text()))
    table = common.Table.titled("near-duplicates")
    for count, find in ((args.beside, ensemble), (args.beside, ours), (args.documents, ours)):
        texts, twin_of = documents(walks, count)
        began = time.process_time()
        groups = find(texts)
        seconds = time.process_time() - began
        name = f"{find.__name__}, {count:,} documents"
        table.add(f"{name}: CPU seconds", seconds)
        for kind, pairs in twin_of.items():
            found = np.mean([groups[a] == groups[b] for a, b in pairs])
            table.add(f"{name}: {kind} found", float(found), at_least=1.0 if find is ours else None)
        expected = count - sum(map(len, twin_of.values()))
        table.add(f"{name}: groups too few", expected - len(Counter(groups)))
    table.add("peak memory, GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    return common.finish([table], args.json, load)


class Walks:
    """Random walks from word to next word."""

    def __init__(self, words: Sequence[str]) -> None:
        self.next: dict[str, list[str]] = {}
        for word, following in pairwise(words):
            self.next.setdefault(word, []).append(following)
        self.rng, self.words = np.random.default_rng(0), words

    def __call__(self, length: int) -> list[str]:
        draws = self.rng.random(length)
        walk = [self.words[int(draws[0] * (len(self.words) - 1))]]
        for draw in draws[1:]:
            following = self.next.get(walk[-1], self.words)
            walk.append(following[int(draw * len(following))])
        return walk


def documents(walks: Walks, count: int) -> tuple[list[str], dict[str, list[tuple[int, int]]]]:
    """The texts, and (index of the original, index of its twin) of each kind of pair."""
    twins: dict[str, list[tuple[int, int]]] = {"excerpts": [], "half-overlapping windows": [], "changed words": []}
    made: list[list[str]] = []
    for index in range(count):
        kind, other = index % 100, index - 50  # its original is no twin itself
        if kind == 97:
            made.append(made[other][10:130])
            twins["excerpts"].append((other, index))
        elif kind == 98:
            made[other] = walks(120)
            made.append(made[other][60:] + walks(60))
            twins["half-overlapping windows"].append((other, index))
        elif kind == 99:
            changed = list(made[other])
            changed[20::40] = ["changed"] * len(changed[20::40])
            made.append(changed)
            twins["changed words"].append((other, index))
        else:
            made.append(walks(int(walks.rng.integers(150, 400))))
    return [" ".join(words) for words in made], twins


def ours(texts: Sequence[str]) -> list[int]:
    return duplicates.near_duplicates(texts, THRESHOLD).groups


def ensemble(texts: Sequence[str]) -> list[int]:
    from datasketch import MinHash, MinHashLSHEnsemble

    words, length = duplicates._words(texts)
    passages = [{*duplicates._runs(w, duplicates._passage(n)).tolist()} for w, n in zip(words, length, strict=True)]
    identity: Callable[[int], int] = lambda value: value & 0xFFFFFFFF  # noqa: E731
    hashes = [MinHash(128, hashfunc=identity) for _ in passages]
    for minhash, some in zip(hashes, passages, strict=True):
        minhash.update_batch(some)
    index = MinHashLSHEnsemble(threshold=THRESHOLD / 2, num_perm=128, num_part=32)
    index.index((i, minhash, len(some)) for i, (minhash, some) in enumerate(zip(hashes, passages, strict=True)))
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, (minhash, mine) in enumerate(zip(hashes, passages, strict=True)):
        for j in index.query(minhash, len(mine)):
            if root(i) != root(j) and len(mine & passages[j]) >= THRESHOLD / 2 * min(len(mine), len(passages[j])):
                parent[max(root(i), root(j))] = min(root(i), root(j))
    return [root(i) for i in range(len(texts))]


if __name__ == "__main__":
    sys.exit(main())
