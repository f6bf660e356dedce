"""Records and tokens: which texts, in which split, and what of them becomes a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysae.artifacts import fingerprint
from raysae.data.duplicates import near_duplicates
from raysae.data.records import read_records, write_records
from raysae.data.sources import LeftOut, load_problems
from raysae.data.splits import assign_splits, unseen
from raysae.data.tokens import tokenize
from raysae.errors import UserError
from raysae.files import sha256_of
from raysae.progress import say
from raysae.workspace import Inputs, Stage

if TYPE_CHECKING:
    from raysae.bench import Bench
    from raysae.config.sections import DataConfig
    from raysae.stages.model import Model

OF_RECORDS = (
    "source", "path", "examples", "validation_fraction", "test_fraction", "near_duplicate_similarity", "on_bad_row",
)  # fmt: skip
OF_SOURCE = {
    "gsm8k": ("subset", "hub_split"),
    "text": ("text_separator", "text_replace"),
    "dataset": ("subset", "hub_split", "columns"),
}
"""Fields of the data that records depend on, those of every source and those of one."""
CONTEXT_AT_MOST = 512
"""Context length where neither the config nor the model asks for less."""
MAX_DROPPED = 0.5
"""Share of examples that may be too long for the context before that is the user's mistake."""


def records(data: DataConfig, seed: int, apart_from: Stage | None = None) -> Stage:
    """Examples with their splits: `records.parquet`. With the records `apart_from` it is a held-out dataset: whole, but
    for what is near to an example of these."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        left_out = LeftOut(skip=data.on_bad_row == "skip")
        problems = load_problems(
            data.source, data.path, data.subset, data.hub_split, data.columns.model_dump(), data.text_separator,
            data.text_replace, data.examples, seed, left_out=left_out,
        )  # fmt: skip
        for line in left_out.lines():
            say(f"records: {line}")
        loaded, similarity = len(problems), data.near_duplicate_similarity
        if apart_from is not None:
            known = read_records(inputs["apart_from"].path / "records.parquet")
            problems = unseen(problems, known, similarity)
            say(f"records: {loaded - len(problems):,} of {loaded:,} left out, near to examples of the run's own data")
            if not problems:
                raise UserError("data.source: every example is in the run's own data; name another dataset")
        seen = loaded - len(problems)
        near = None if similarity is None else near_duplicates([p.question for p in problems], similarity)
        problems = assign_splits(problems, data.validation_fraction, data.test_fraction, near, seed)
        if apart_from is not None:
            problems = [replace(p, split="test") for p in problems]
        write_records(path / "records.parquet", problems)
        counts = {split: sum(p.split == split for p in problems) for split in ("train", "validation", "test")}
        groups = len({p.group for p in problems})
        say(f"records: {len(problems):,} examples in {groups:,} groups: {counts}")
        short = None if near is None else near.short / len(problems)
        if short:
            say(f"records: {short:.1%} of the texts are shorter than a shingle; only equal ones unite")
        rows = {"bad_rows": len(left_out.bad), "blank_rows": left_out.blank, "not_compared": short}
        return {"examples": counts, "groups": groups, "left_out": seen, **rows}

    settings = data.model_dump(mode="json", include={*OF_RECORDS, *OF_SOURCE.get(data.source, ())})
    settings |= {"seed": seed, "source_hash": source_hash(data.path)}
    return Stage("records", 3, settings, {"apart_from": apart_from} if apart_from else {}, build)


def tokens(records: Stage, model: Model, data: DataConfig, rows_per_block: int, seed: int) -> Stage:
    """Blocks of token sequences: `<split>-<index>.parquet`, and `spans.parquet`. UserError for a context length that the
    model does not have."""
    length = context_length(data.context_length, model.facts.context_length)

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        read, there = read_records(inputs["records"].path / "records.parquet"), inputs["records"].manifest
        facts = tokenize(read, model.tokenizer, length, data.packing, rows_per_block, seed, path)
        dropped, kept = facts["dropped_too_long"], sum(facts["examples"].values())
        if dropped > MAX_DROPPED * (dropped + kept):
            raise UserError(
                f"data.context_length: {length} leaves out {dropped} of {dropped + kept} examples; raise it "
                f"(the longest has {facts['longest']} tokens), or join texts with data.packing concat"
            )
        lost = {f"examples longer than {length}": dropped, "examples without a row": facts["dropped_empty"]}
        lost["tokens at which a text was cut, no rows"] = facts["cut_starts"]
        said = "".join(f"; left out: {count:,} {what}" for what, count in lost.items() if count)
        say(f"tokens: {facts['rows']}{said}")
        lost |= {"bad rows": there["bad_rows"], "rows without text": there["blank_rows"]}
        facts["left_out"] = {what: count for what, count in lost.items() if count}
        return {**facts, "not_compared": there["not_compared"], "cost": {"tokens": sum(facts["rows"].values())}}

    settings = {
        "tokenizer": fingerprint(model.tokenizer.backend_tokenizer.to_str()),
        "special": model.tokenizer.special_tokens_map,
        "context_length": length,
        "packing": data.packing,
        "rows_per_block": rows_per_block,
        "seed": seed,
    }
    return Stage("tokens", 3, settings, {"records": records}, build)


def context_length(asked: int | None, allowed: int | None) -> int:
    """The context length that a config asks for, checked against the model's; unset, the model's up to CONTEXT_AT_MOST."""
    if asked is None:
        return min(allowed or CONTEXT_AT_MOST, CONTEXT_AT_MOST)
    if allowed is not None and asked > allowed:
        raise UserError(f"data.context_length: {asked} is longer than the model allows ({allowed} positions)")
    return asked


def source_hash(given: str | None) -> str | None:
    """Hash of a local source's bytes: the same path with other content is another dataset. None for one of the hub."""
    path = Path(given) if given else None
    if path is None or not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return fingerprint([(p.name, sha256_of(p)) for p in files])
