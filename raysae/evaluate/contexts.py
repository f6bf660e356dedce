"""The text around a store's rows: which token a row is, what stands before and after it, and how that reads.

Rows carry example_id and position, and a shard has the name of the token block that it was captured from, so a row finds
its place in its sequence again. A window never leaves the row's own part of its sequence: other examples packed beside it
are another text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from raysae.activations.store import Store
from raysae.data.tokens import read_block
from raysae.errors import UserError

PIECES_AT_ONCE, ANCHOR = 32, 8


class Texts:
    """The tokens [T] behind the rows [R] of some shards, in stored order.

    ids, position, example [T]: token id, place in its example, and index into `example_ids`; start, end [T]: the first
    token of its example's part of the sequence, and one past the last; row_of_token [T]: -1 for special tokens;
    token_of_row [R]. UserError where a shard's rows are not those tokens.
    """

    def __init__(self, store: Store, names: Sequence[str], files: Mapping[str, Path]) -> None:
        number: dict[str, int] = {}
        parts: dict[str, list[np.ndarray]] = {key: [] for key in ("ids", "position", "example", "start", "end")}
        of_row, tokens, steps = [], 0, []
        for name in names:
            block = read_block(files[name], name)
            ids, position, local = (np.concatenate(a) for a in (block.input_ids, block.positions, block.example))
            sequence = np.repeat(np.arange(len(block.input_ids)), [len(a) for a in block.input_ids])
            begins = np.r_[True, (np.diff(sequence) != 0) | (np.diff(local) != 0)]
            edges = np.append(np.flatnonzero(begins), len(ids))
            part = np.cumsum(begins) - 1
            rows = store.row_columns(name, ("example_id", "position", "token_id", "step")).to_pandas()
            at = _find(rows, pd.Index(block.example_ids), local, position)
            if (at < 0).any() or not np.array_equal(ids[at], rows["token_id"]):
                raise UserError(f"store: the rows of {name} are not the tokens of {files[name]}; capture again")
            codes = np.array([number.setdefault(example, len(number)) for example in block.example_ids])
            columns = (ids, position, codes[local], edges[part] + tokens, edges[part + 1] + tokens)
            for key, values in zip(parts, columns, strict=True):
                parts[key].append(values)
            of_row.append(at + tokens)
            steps.append(rows["step"].to_numpy())
            tokens += len(ids)
        self.example_ids = list(number)
        self.ids, self.position, self.example, self.start, self.end = (np.concatenate(parts[key]) for key in parts)
        self.token_of_row = np.concatenate(of_row)
        self.row_of_token = np.full(tokens, -1)
        self.row_of_token[self.token_of_row] = np.arange(len(self.token_of_row))
        self._steps = np.concatenate(steps)
        self._pieces: dict[int, list[str]] = {}

    def rows(self, count: int) -> pd.DataFrame:
        """example_id and step of the first `count` rows, as `labels.label_rows` wants them."""
        names = np.array(self.example_ids, dtype=object)[self.example[self.token_of_row[:count]]]
        return pd.DataFrame({"example_id": names, "step": self._steps[:count]})

    def window(self, rows: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """First token and one past the last [n] of the `reach` tokens on either side of each row [n]."""
        token = self.token_of_row[rows]
        return np.maximum(token - reach, self.start[token]), np.minimum(token + reach + 1, self.end[token])

    def pieces(self, first: int, last: int, decode: Callable[[list[int]], str]) -> list[str]:
        """The text of each token in [first, last), which lie in one part of a sequence; see `pieces_of`."""
        start = int(self.start[first])
        if start not in self._pieces:
            self._pieces[start] = pieces_of(self.ids[start : self.end[first]].tolist(), decode)
        return self._pieces[start][first - start : last - start]


def pieces_of(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token, such that all together are the decoded text.

    A token's piece is what the text gains by it. Tokens that hold a part of a character (byte-level vocabularies split
    characters) have an empty piece until the one that completes it, which has it whole: never a broken character. Decoded
    in runs of PIECES_AT_ONCE with ANCHOR tokens around them, so that the cost is linear in the length.
    """
    pieces: list[str] = []
    for begin in range(0, len(ids), PIECES_AT_ONCE):
        anchor, end = max(0, begin - ANCHOR), min(begin + PIECES_AT_ONCE, len(ids))
        text = decode(list(ids[anchor : end + ANCHOR]))
        known = [_common(text, decode(list(ids[anchor:i]))) for i in range(begin, end + 1)]
        if end == len(ids):
            known[-1] = len(text)
        known = np.maximum.accumulate(known).tolist()
        pieces += [text[a:b] for a, b in pairwise(known)]
    return pieces


def _common(a: str, b: str) -> int:
    """Length of the longest common start."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _find(rows: pd.DataFrame, examples: pd.Index, local: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Where each row's (example_id, position) stands among a block's tokens; -1 where it does not."""
    width = max(int(position.max(initial=0)), int(rows["position"].max())) + 1
    known = local.astype(np.int64) * width + position
    code = examples.get_indexer(rows["example_id"].astype(str)).astype(np.int64)
    wanted = np.where(code < 0, -1, code * width + rows["position"].to_numpy())
    order = np.argsort(known, kind="stable")
    at = order[np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)]
    return np.where(known[at] == wanted, at, -1)
