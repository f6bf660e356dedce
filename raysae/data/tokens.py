"""Token sequences in shuffled blocks, with every token's example, position and reasoning step.

A block is one Parquet file and the unit of capture and resume. Sequences are shuffled across examples before they are
cut into blocks, so that each block is a fair sample of its split. Steps are found through the tokenizer's character
offsets: decoding tokens one by one breaks on characters of several bytes. Padding appears only in `micro_batches`,
always on the right and masked, so that it never becomes a row.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raysae.data.records import QUESTION_STEP, Problem, render
from raysae.data.splits import SPLITS
from raysae.errors import UserError

TOKENIZER_BATCH = 1000

SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("example_ids", pa.list_(pa.string())),
        ("starts", pa.list_(pa.int32())),
        ("groups", pa.list_(pa.string())),
        ("positions", pa.list_(pa.int32())),
        ("step", pa.list_(pa.int16())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("split", pa.string()),
    ]
)
SPANS_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int32()),
        ("example_id", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("step", pa.int16()),
    ]
)


def tokenize(
    problems: Sequence[Problem],
    tokenizer: Any,
    context_length: int,
    packing: str,
    rows_per_block: int,
    seed: int,
    out_dir: Path,
) -> dict[str, Any]:
    """Tokenize each split into blocks `out_dir/<split>-<index>.parquet` (`SCHEMA`) and `spans.parquet`.

    Each example is preceded by the tokenizer's BOS token, else its EOS token, where it has one.
    packing: `problems` makes each example a sequence, and drops examples longer than `context_length` tokens; `concat`
    joins the examples of a split and cuts every `context_length` tokens, so that an example may run over into the next
    sequence, where its positions go on counting.
    rows_per_block: most kept tokens in a block (a longer sequence is a block of its own). Kept are all but special
    tokens (those that tokenizer.json marks special: chat templates' too) and the first token of a sequence. That is the
    separator, or a token at which a text was cut, which attends to nothing but itself: whatever the token, models keep an
    attention sink there (median norm 1.8 times the other rows' in gsm-nano, hundreds of times in large models; Xiao et
    al. 2023, Sun et al. 2024), which is neither a row to learn from nor one to be scored.

    `spans.parquet` lists, for each part of a step that lies in one sequence, its tokens [start, end) and the step.

    Returns the stage's part of the manifest. Same arguments, same files. Raises UserError for a tokenizer without
    offsets, and where a split has no example left.
    """
    if not tokenizer.is_fast:
        raise UserError(f"model.tokenizer: {tokenizer.name_or_path!r} gives no character offsets; use a fast tokenizer")
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    # An unknown word is text. But GPT-2's unk token is also its separator, and that is none.
    special = sorted(({*tokenizer.all_special_ids} | marked) - {tokenizer.unk_token_id} | {separator} - {None})
    out_dir.mkdir(parents=True, exist_ok=True)

    blocks: list[dict[str, Any]] = []
    spans: list[tuple[Any, ...]] = []
    seen: set[int] = set()
    manifest: dict[str, Any] = {
        "context_length": context_length,
        "packing": packing,
        "separator_id": separator,
        "dropped_too_long": 0,
        "dropped_empty": 0,
        "cut_starts": 0,
        "largest_id": 0,
        "longest": 0,
        "examples": {},
        "sequences": {},
        "rows": {},
    }
    sequence_id = 0
    for split_index, split in enumerate(SPLITS):
        members = [p for p in problems if p.split == split]
        if not members:
            continue  # a held-out dataset is all of one split
        encoded = _encode(members, tokenizer, separator, special)
        examples = [example for example in encoded if example.keep[1:].any()]
        manifest["dropped_empty"] += len(encoded) - len(examples)
        lengths = [len(example.input_ids) for example in examples]
        manifest["longest"] = max([manifest["longest"], *lengths])
        if packing == "problems":
            manifest["dropped_too_long"] += sum(length > context_length for length in lengths)
            examples = [example for example in examples if len(example.input_ids) <= context_length]
            sequences = [[Piece(example, 0, len(example.input_ids))] for example in examples]
        else:
            sequences = _concatenate(examples, context_length)
        if not examples:
            raise UserError(
                f"data.context_length: {context_length} leaves no example in the {split} split; "
                f"its longest example has {max(lengths, default=0)} tokens"
            )
        largest = max(int(example.input_ids.max()) for example in examples)
        manifest["largest_id"] = max(manifest["largest_id"], largest)
        first = [pieces[0] for pieces in sequences]
        manifest["cut_starts"] += sum(bool(piece.example.keep[piece.start]) for piece in first)
        seen.update(np.unique(np.concatenate([example.input_ids[example.keep] for example in examples])).tolist())
        order = np.random.default_rng([seed, split_index]).permutation(len(sequences))
        shuffled = [sequences[index] for index in order]
        for index, filled in enumerate(_fill(shuffled, rows_per_block)):
            numbered = list(enumerate(filled, start=sequence_id))
            blocks.append(_write_block(out_dir, split, index, numbered))
            spans.extend(span for number, pieces in numbered for span in _spans(number, pieces))
            sequence_id += len(filled)
        manifest["examples"][split] = len(examples)
        manifest["sequences"][split] = len(sequences)
        manifest["rows"][split] = sum(block["rows"] for block in blocks if block["split"] == split)

    rows = [dict(zip(SPANS_SCHEMA.names, span, strict=True)) for span in spans]
    pq.write_table(pa.Table.from_pylist(rows, schema=SPANS_SCHEMA), out_dir / "spans.parquet", compression="zstd")
    return manifest | {"unique_tokens": len(seen), "blocks": blocks}


def read_block(source: Path | bytes, name: str | None = None) -> TokenBlock:
    """Read a block from its file or from the file's content. Its name defaults to the one in the manifest."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    table = pq.ParquetFile(pa.BufferReader(content)).read()
    lists = {field.name: table[field.name].combine_chunks() for field in table.schema if pa.types.is_list(field.type)}
    offsets = lists["input_ids"].offsets.to_numpy()

    def per_token(column: str, dtype: type) -> list[np.ndarray]:
        flat = lists[column].flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        return _slices(flat, offsets)

    # Each token's example: an example reaches from its start to the next start, or to the end of its sequence.
    encoded = lists["example_ids"].flatten().dictionary_encode()
    indices = encoded.indices.to_numpy()
    first = np.unique(indices, return_index=True)[1]
    begins = lists["starts"].flatten().to_numpy() + np.repeat(offsets[:-1], np.diff(lists["starts"].offsets.to_numpy()))
    example = np.repeat(indices, np.diff(begins, append=offsets[-1]))
    return TokenBlock(
        name=name or _block_name(table.schema.metadata[b"block"].decode(), content),
        split=table["split"][0].as_py(),
        sequence_id=table["sequence_id"].to_numpy(),
        input_ids=per_token("input_ids", np.int64),
        positions=per_token("positions", np.int32),
        step=per_token("step", np.int16),
        loss_mask=per_token("loss_mask", np.bool_),
        example=_slices(example, offsets),
        example_ids=encoded.dictionary.to_pylist(),
        groups=lists["groups"].flatten().take(pa.array(first)).to_pylist(),
    )


def micro_batches(block: TokenBlock, tokens_per_forward: int) -> Iterator[MicroBatch]:
    """Cut a block into padded batches of similar lengths, longest first, so that too large a batch fails at once.

    A batch holds at most `tokens_per_forward` tokens, padding counted, and at least one sequence. Every sequence occurs
    once.
    """
    lengths = np.array([len(ids) for ids in block.input_ids])
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = int(lengths[order[start]])
        index = order[start : start + max(1, tokens_per_forward // width)]
        input_ids = torch.zeros(len(index), width, dtype=torch.long)
        attention_mask = torch.zeros(len(index), width, dtype=torch.long)
        mask = torch.zeros(len(index), width, dtype=torch.bool)
        for row, sequence in enumerate(index):
            length = lengths[sequence]
            input_ids[row, :length] = torch.from_numpy(block.input_ids[sequence])
            attention_mask[row, :length] = 1
            mask[row, :length] = torch.from_numpy(block.loss_mask[sequence])
        yield MicroBatch(index, input_ids, attention_mask, mask)
        start += len(index)


def token_steps(text: str, spans: Iterable[tuple[int, int, int]], offsets: np.ndarray) -> np.ndarray:
    """The step of each token, int16 [tokens], from character spans (step, start, end) and offsets [tokens, 2].

    A token belongs to the step that holds its first non-space character (a leading space often belongs to the token),
    or its first character if it is all space. Outside the spans it is -1.
    """
    step_of = np.full(len(text) + 1, QUESTION_STEP, dtype=np.int16)
    for step, start, end in spans:
        step_of[start:end] = step
    solid = np.array([index for index, character in enumerate(text) if not character.isspace()] + [len(text)])
    starts, ends = offsets.reshape(-1, 2).T
    first_solid = solid[np.searchsorted(solid, starts)]
    return step_of[np.where(first_solid < ends, first_solid, starts)]


def _encode(problems: list[Problem], tokenizer: Any, separator: int | None, special: list[int]) -> list[Example]:
    """Tokenize in batches, with the separator in front."""
    examples = []
    for begin in range(0, len(problems), TOKENIZER_BATCH):
        batch = problems[begin : begin + TOKENIZER_BATCH]
        rendered = [render(problem) for problem in batch]
        encoded = tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for problem, (text, spans), ids, offsets in zip(
            batch, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            step = token_steps(text, spans, np.array(offsets, dtype=np.int64))
            if separator is not None:
                ids, step = [separator, *ids], np.concatenate([np.array([QUESTION_STEP], np.int16), step])
            input_ids = np.array(ids, dtype=np.int32)
            examples.append(Example(problem, input_ids, step, ~np.isin(input_ids, special)))
    return examples


def _concatenate(examples: list[Example], context_length: int) -> list[list[Piece]]:
    """Join the examples and cut every `context_length` tokens; the last sequence may be shorter."""
    sequences: list[list[Piece]] = [[]]
    room = context_length
    for example in examples:
        start, length = 0, len(example.input_ids)
        while start < length:
            if not room:
                sequences.append([])
                room = context_length
            end = min(length, start + room)
            sequences[-1].append(Piece(example, start, end))
            room -= end - start
            start = end
    return sequences


def _fill(sequences: list[list[Piece]], rows_per_block: int) -> Iterator[list[list[Piece]]]:
    """Consecutive sequences with at most `rows_per_block` kept tokens together."""
    block: list[list[Piece]] = []
    rows = 0
    for sequence in sequences:
        kept = int(_kept(sequence).sum())
        if block and rows + kept > rows_per_block:
            yield block
            block, rows = [], 0
        block.append(sequence)
        rows += kept
    yield block


def _kept(sequence: list[Piece]) -> np.ndarray:
    """Which tokens of a sequence are rows and scored, bool [tokens]: never the first."""
    keep = np.concatenate([piece.example.keep[piece.start : piece.end] for piece in sequence])
    keep[0] = False
    return keep


def _write_block(out_dir: Path, split: str, index: int, sequences: list[tuple[int, list[Piece]]]) -> dict[str, Any]:
    pieces = [piece for _, members in sequences for piece in members]
    piece_offsets = np.cumsum([0, *(len(members) for _, members in sequences)])
    lengths = np.array([piece.end - piece.start for piece in pieces])
    ends = np.cumsum(lengths)
    offsets = np.concatenate([[0], ends])[piece_offsets]
    starts = ends - lengths - np.repeat(offsets[:-1], np.diff(piece_offsets))
    keep = np.concatenate([_kept(members) for _, members in sequences])

    input_ids = np.concatenate([piece.example.input_ids[piece.start : piece.end] for piece in pieces])
    step = np.concatenate([piece.example.step[piece.start : piece.end] for piece in pieces])
    positions = np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])

    def listed(column: str, values: Any, at: np.ndarray) -> pa.Array:
        value_type = SCHEMA.field(column).type.value_type
        return pa.ListArray.from_arrays(pa.array(at, pa.int32()), pa.array(values, value_type))

    columns = {
        "sequence_id": pa.array([number for number, _ in sequences], pa.int32()),
        "input_ids": listed("input_ids", input_ids, offsets),
        "example_ids": listed("example_ids", [piece.example.problem.example_id for piece in pieces], piece_offsets),
        "starts": listed("starts", starts, piece_offsets),
        "groups": listed("groups", [piece.example.problem.group for piece in pieces], piece_offsets),
        "positions": listed("positions", positions, offsets),
        "step": listed("step", step, offsets),
        "loss_mask": listed("loss_mask", keep, offsets),
        "split": pa.array([split] * len(sequences)),
    }
    stem = f"{split}-{index:05d}"
    table = pa.table(columns, schema=SCHEMA.with_metadata({"block": stem}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=len(sequences))
    content = buffer.getvalue()
    (out_dir / f"{stem}.parquet").write_bytes(content)
    return {
        "name": _block_name(stem, content),
        "file": f"{stem}.parquet",
        "split": split,
        "sequences": len(sequences),
        "tokens": len(keep),
        "rows": int(keep.sum()),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _block_name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}"


def _spans(sequence_id: int, pieces: list[Piece]) -> Iterator[tuple[int, str, int, int, int]]:
    """Runs of tokens of one step, as (sequence_id, example_id, start, end, step); tokens outside steps have none."""
    at = 0
    for example, start, end in pieces:
        step = example.step[start:end]
        edges = [0, *(np.flatnonzero(np.diff(step)) + 1).tolist(), len(step)]
        for left, right in pairwise(edges):
            if step[left] != QUESTION_STEP:
                yield sequence_id, example.problem.example_id, at + left, at + right, int(step[left])
        at += len(step)


def _slices(flat: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    return [flat[start:end] for start, end in pairwise(offsets)]


class Example(NamedTuple):
    """A tokenized problem, its separator included."""

    problem: Problem
    input_ids: np.ndarray  # int32 [tokens]
    step: np.ndarray  # int16 [tokens]
    keep: np.ndarray  # bool [tokens], False for special tokens


class Piece(NamedTuple):
    """The tokens [start, end) of an example, as part of a sequence."""

    example: Example
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """The sequences of one block. Lists have one array per sequence, of its length in tokens."""

    name: str
    """`<split>-<index>-<first 8 hex digits of the content's sha256>`."""
    split: str
    sequence_id: np.ndarray
    """int32 [sequences]"""
    input_ids: list[np.ndarray]
    """int64"""
    positions: list[np.ndarray]
    """int32, the token's place in its example; the separator has 0."""
    step: list[np.ndarray]
    """int16, -1 in the question and outside steps."""
    loss_mask: list[np.ndarray]
    """bool, True for a token that becomes a row and is scored."""
    example: list[np.ndarray]
    """int32, index into `example_ids`."""
    example_ids: list[str]
    """The distinct examples of the block."""
    groups: list[str]
    """The group of each of `example_ids`."""

    @property
    def rows(self) -> int:
        """Kept tokens."""
        return sum(int(mask.sum()) for mask in self.loss_mask)

    def first(self, count: int) -> TokenBlock:
        """Its first `count` sequences (they lie in random order)."""
        names = ("sequence_id", "input_ids", "positions", "step", "loss_mask", "example")
        return replace(self, **{name: getattr(self, name)[:count] for name in names})


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Sequences of a block, padded on the right to one length."""

    index: np.ndarray
    """int64 [b], which sequences of the block."""
    input_ids: torch.Tensor
    """int64 [b, T], 0 in padding."""
    attention_mask: torch.Tensor
    """int64 [b, T], 0 in padding."""
    mask: torch.Tensor
    """bool [b, T], the `loss_mask`; False in padding."""
