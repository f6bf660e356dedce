"""Problems from the embedded generator, GSM8K, plain text, or any local or hub dataset.

Every source ends in the same records. Ids come from the row in the source, so that they stay the same when only a
sample is kept. What a user can get wrong in a file is answered with the file, the line and what was expected.
"""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    left_out: LeftOut | None = None,
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
    left_out: counts rows that became no record, and says whether bad ones may be left out; unset: they may not.

    Raises UserError for missing files, malformed rows, missing columns, and where nothing is left.
    """
    left_out = left_out or LeftOut()
    local = (base_dir or Path()) / path if path is not None else None
    if source == "arithmetic":
        problems = _arithmetic(examples or ARITHMETIC_EXAMPLES, seed)
    elif source == "gsm8k":
        problems = _gsm8k(local, subset, hub_split, left_out)
    elif source == "text":
        problems = _text(local, text_separator, text_replace)
    elif source == "dataset":
        if path is None or local is None:
            raise UserError("data.path: not set; source dataset needs a file or a hub name")
        problems = _dataset(path, local, subset, hub_split, columns or {}, examples, seed, left_out)
    else:
        raise UserError(f"data.source: {source!r} is not one of arithmetic, gsm8k, text, dataset")
    if not problems:
        bad = f", and {left_out.lines()[0]}" if left_out.bad else ""
        raise UserError(f"data.path: no example in {path}{bad}")
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


def _gsm8k(path: Path | None, subset: str | None, split: str, left_out: LeftOut) -> list[Problem]:
    if path is None:
        rows = _hub(GSM8K_HUB[0], subset or GSM8K_HUB[1], split)
        located = iter([(f"{GSM8K_HUB[0]} row {row}", record) for row, record in enumerate(rows)])
    else:
        file = path / f"{split}.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"data.path: no file {file}; give GSM8K's JSONL file, or a folder that holds {split}.jsonl")
        split = file.stem
        located = _read_jsonl(file, left_out)
    problems = []
    for row, (where, record) in enumerate(located):
        wrong = [key for key in ("question", "answer") if not isinstance(record.get(key), str)]
        if wrong:
            found = f"holds {_short(record[wrong[0]])}" if wrong[0] in record else "is missing"
            left_out.refuse(f"{where}: key {wrong[0]!r} {found}; it must hold text")
            continue
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
    left_out: LeftOut,
) -> list[Problem]:
    if local.is_file() or local.suffix in LOADERS:
        rows, place, prefix, dataset = _local_rows(local, left_out), str(local), local.stem, local.stem
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
        wrong = _wrong(values)
        if wrong:
            left_out.refuse(f"{place} row {row}: {wrong}")
            continue
        question = str(values["question"])
        if not question.strip():
            left_out.blank += 1
            continue
        steps = values.get("steps")
        if isinstance(steps, str):
            steps = steps.split("\n")
        problems.append(
            make_problem(
                str(values.get("example_id", f"{prefix}/{row}")),
                dataset,
                question,
                group=str(values["group"]) if "group" in values else None,
                answer=str(values.get("answer", "")),
                steps=steps,
            )
        )
    for example_id, times in Counter(problem.example_id for problem in problems).items():
        if times > 1:
            raise UserError(f"data.columns.example_id: {example_id!r} occurs {times} times in {place}; ids are unique")
    return problems


def _wrong(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a row's values by role, or None."""
    if not isinstance(values["question"], str):
        return f"data.columns.question holds {_short(values['question'])}; it must hold text"
    for role in ("answer", "group", "example_id"):
        if role in values and (isinstance(values[role], bool) or not isinstance(values[role], str | int | float)):
            return f"data.columns.{role} holds {_short(values[role])}; it must hold text or a number"
    steps = values.get("steps", "")
    if not isinstance(steps, str) and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
        return f"data.columns.steps holds {_short(steps)}; it must hold text or a list of texts"
    return None


def _local_rows(path: Path, left_out: LeftOut) -> Sequence[dict[str, Any]]:
    if path.suffix not in LOADERS:
        raise UserError(f"data.path: {path} is not a {', '.join(LOADERS)} file")
    if not path.is_file():
        raise UserError(f"data.path: no file {path}")
    if path.suffix == ".jsonl":  # our own reader names the line that is malformed
        return [record for _, record in _read_jsonl(path, left_out)]
    if path.suffix != ".parquet":
        _check_text(path)
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


def _read_jsonl(path: Path, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its place `file:line`; blank lines are skipped."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "\\ud" in line.lower():  # one half of a pair is JSON, but no text that can be stored or tokenized
                json.dumps(record, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            left_out.refuse(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})")
        except UnicodeEncodeError as error:
            lone = error.object[error.start].encode("unicode_escape").decode()
            left_out.refuse(f"{path}:{number}: {lone} is half of a character (a lone surrogate), which is no text")
        except RecursionError:
            left_out.refuse(f"{path}:{number}: nested too deeply to be read")
        else:
            if isinstance(record, dict):
                yield f"{path}:{number}", record
            else:
                left_out.refuse(f"{path}:{number}: holds {_short(record)}; each line must be a JSON object")


def _read_text(path: Path) -> str:
    _check_text(path)
    return path.read_text(encoding="utf-8-sig")


def _check_text(path: Path) -> None:
    """Refuse a file that is not UTF-8."""
    decoder, done = getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            part = file.read(1 << 20)
            if done == 0 and (part.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in part):
                raise UserError(f"{path}: not UTF-8 but UTF-16, it seems, or binary; convert the file (iconv -t UTF-8)")
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                at = done + error.start - len(decoder.getstate()[0])
                raise UserError(f"{path}: not UTF-8 at byte {at}; convert the file (iconv -t UTF-8)") from None
            done += len(part)
            if not part:
                return


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


@dataclass
class LeftOut:
    """Rows of a source that became no record."""

    skip: bool = False
    """Leave bad rows out; else the first is a UserError."""
    bad: list[str] = field(default_factory=list)
    """What is wrong with each bad row, and where it is."""
    blank: int = 0
    """Rows whose question is empty, or space alone."""

    def refuse(self, line: str) -> None:
        """Note a bad row, or raise."""
        if not self.skip:
            raise UserError(f"{line}; mend it, or leave such rows out with data.on_bad_row skip")
        self.bad.append(line)

    def lines(self) -> list[str]:
        """What a run says of it."""
        said = [f"{len(self.bad):,} bad rows left out, the first {self.bad[0]}"] if self.bad else []
        return said + ([f"{self.blank:,} rows without text left out"] if self.blank else [])
