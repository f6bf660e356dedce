"""Problems from the embedded generator, GSM8K, plain text, or any local or hub dataset.

Every source ends in the same records. Ids come from the row in the source, so that they stay the same when only a
sample is kept. What a user can get wrong in a file is answered with the file, the line and what was expected.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysae.data import arithmetic
from raysae.data.records import Problem, make_problem
from raysae.errors import UserError

GSM8K_HUB = ("openai/gsm8k", "main")
ARITHMETIC_EXAMPLES = 3000
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_problems(
    source: str,
    path: str | None = None,
    subset: str | None = None,
    hub_split: str = "train",
    columns: Mapping[str, str | None] | None = None,
    text_separator: str = "\n\n",
    text_replace: tuple[str, str] | None = None,
    examples: int | None = None,
    seed: int = 0,
    base_dir: Path | None = None,
) -> list[Problem]:
    """Load a source as records without splits.

    source: `arithmetic` (embedded generator), `gsm8k` (JSONL file, folder with `<hub_split>.jsonl`, or the hub),
    `text` (a file or a folder of .txt) or `dataset` (a .json, .jsonl, .csv or .parquet file, or what the `datasets`
    library loads by name: a hub dataset, a folder).
    columns: for `dataset`, which column holds `question`, `answer`, `steps`, `group`, `example_id`.
    text_separator: regular expression between the examples of a text file.
    text_replace: literal (old, new), applied to each text.
    examples: how many to generate, or to keep at most: a sample without replacement, in source order.
    base_dir: folder that a relative `path` starts from.

    Raises UserError for missing files, malformed rows, missing columns, and where nothing is left.
    """
    local = (base_dir or Path()) / path if path is not None else None
    if source == "arithmetic":
        problems = _arithmetic(examples or ARITHMETIC_EXAMPLES, seed)
    elif source == "gsm8k":
        problems = _gsm8k(local, subset, hub_split)
    elif source == "text":
        problems = _text(local, text_separator, text_replace)
    elif source == "dataset":
        if path is None or local is None:
            raise UserError("data.path: not set; source dataset needs a file or a hub name")
        problems = _dataset(path, local, subset, hub_split, columns or {}, examples, seed)
    else:
        raise UserError(f"data.source: {source!r} is not one of arithmetic, gsm8k, text, dataset")
    if not problems:
        raise UserError(f"data.path: no example in {path}")
    return [problems[index] for index in _sample(len(problems), examples, seed)]


def _sample(count: int, examples: int | None, seed: int) -> list[int]:
    """Indices to keep, in order: all, or `examples` of them drawn without replacement."""
    if examples is None or examples >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, size=examples, replace=False).tolist())


def _arithmetic(count: int, seed: int) -> list[Problem]:
    return [
        make_problem(f"arithmetic/{seed}/{row}", "arithmetic", item.question, answer=item.answer, meta=item.meta)
        for row, item in enumerate(arithmetic.generate(count, seed, "held_out"))
    ]


def _gsm8k(path: Path | None, subset: str | None, split: str) -> list[Problem]:
    if path is None:
        rows = _hub(GSM8K_HUB[0], subset or GSM8K_HUB[1], split)
        located = iter([(f"{GSM8K_HUB[0]} row {row}", record) for row, record in enumerate(rows)])
    else:
        file = path / f"{split}.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"data.path: no file {file}; give GSM8K's JSONL file, or a folder that holds {split}.jsonl")
        split = file.stem
        located = _read_jsonl(file)
    problems = []
    for row, (where, record) in enumerate(located):
        for key in ("question", "answer"):
            if not isinstance(record.get(key), str):
                found = f"holds {_short(record[key])}" if key in record else "is missing"
                raise UserError(f"{where}: key {key!r} {found}; it must hold text")
        problems.append(make_problem(f"gsm8k/{split}/{row}", "gsm8k", record["question"], answer=record["answer"]))
    return problems


def _text(path: Path | None, separator: str, substitution: tuple[str, str] | None) -> list[Problem]:
    if path is None:
        raise UserError("data.path: not set; source text needs a file or a folder of .txt files")
    if not path.exists():
        raise UserError(f"data.path: no file or folder {path}")
    try:
        pattern = re.compile(separator)
    except re.error as error:
        raise UserError(f"data.text_separator: {separator!r} is not a regular expression ({error})") from None
    problems = []
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        name = f"{path.name}/{file.relative_to(path).with_suffix('').as_posix()}" if path.is_dir() else path.stem
        for row, piece in enumerate(_cut(_read_text(file), pattern)):
            text = (piece.replace(*substitution) if substitution else piece).strip("\n")
            if text.strip():
                problems.append(make_problem(f"{name}/{row}", path.stem, text))
    return problems


def _dataset(
    name: str,
    local: Path,
    subset: str | None,
    split: str,
    columns: Mapping[str, str | None],
    examples: int | None,
    seed: int,
) -> list[Problem]:
    if local.is_file() or local.suffix in LOADERS:
        rows, place, prefix, dataset = _local_rows(local), str(local), local.stem, local.stem
    else:
        # `datasets` reads a folder as it reads a hub name; an id holds the folder's name, as its path is the machine's.
        place, dataset = (str(local), local.name) if local.is_dir() else (name, name)
        rows, prefix = _hub(place, subset, split), f"{dataset}/{split}"
    if not len(rows):
        raise UserError(f"data.path: no row in {place}")
    present = list(rows[0])
    chosen = {role: column for role, column in {"question": "question", **columns}.items() if column is not None}
    for role, column in chosen.items():
        if column not in present:
            raise UserError(f"data.columns.{role}: no column {column!r} in {place}; it has {', '.join(present)}")

    problems = []
    # The sample is drawn before rows are read: a hub corpus may be larger than memory.
    for row in _sample(len(rows), examples, seed):
        record = rows[row]
        values = {role: record.get(column) for role, column in chosen.items()}
        where = f"{place} row {row}"
        if not isinstance(values["question"], str):
            raise UserError(f"{where}: data.columns.question holds {_short(values['question'])}; it must hold text")
        if not values["question"].strip():
            continue
        for role in ("answer", "group", "example_id"):
            if role in values and (isinstance(values[role], bool) or not isinstance(values[role], str | int | float)):
                raise UserError(
                    f"{where}: data.columns.{role} holds {_short(values[role])}; it must hold text or a number"
                )
        steps = values.get("steps")
        if isinstance(steps, str):
            steps = steps.split("\n")
        if "steps" in values and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
            raise UserError(f"{where}: data.columns.steps holds {_short(steps)}; it must hold text or a list of texts")
        problems.append(
            make_problem(
                str(values.get("example_id", f"{prefix}/{row}")),
                dataset,
                values["question"],
                group=str(values["group"]) if "group" in values else None,
                answer=str(values.get("answer", "")),
                steps=steps,
            )
        )
    for example_id, times in Counter(problem.example_id for problem in problems).items():
        if times > 1:
            raise UserError(f"data.columns.example_id: {example_id!r} occurs {times} times in {place}; ids are unique")
    return problems


def _local_rows(path: Path) -> Sequence[dict[str, Any]]:
    if path.suffix not in LOADERS:
        raise UserError(f"data.path: {path} is not a {', '.join(LOADERS)} file")
    if not path.is_file():
        raise UserError(f"data.path: no file {path}")
    if path.suffix == ".jsonl":  # our own reader names the line that is malformed
        return [record for _, record in _read_jsonl(path)]
    return _load(str(path), LOADERS[path.suffix], data_files=str(path), split="train")


def _hub(name: str, subset: str | None, split: str) -> Sequence[dict[str, Any]]:
    return _load(f"{name} (subset {subset}, split {split})", name, subset, split=split)


def _load(label: str, *args: Any, **kwargs: Any) -> Any:
    import datasets  # here, because it takes seconds to import and most sources do without it

    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # the library raises a dozen unrelated types for files and names that are wrong
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise UserError(f"data.path: cannot load {label}: {reason}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its place `file:line`; blank lines are skipped."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: holds {_short(record)}; each line must be a JSON object")
        yield f"{path}:{number}", record


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None


def _cut(text: str, separator: re.Pattern[str]) -> Iterator[str]:
    """Like `re.split`, which would return a pattern's groups as pieces too."""
    start = 0
    for match in separator.finditer(text):
        yield text[start : match.start()]
        start = match.end()
    yield text[start:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
