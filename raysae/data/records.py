"""One problem or text as a record, the text that a model reads of it, and its Parquet form.

A record keeps the worked lines apart from the final answer, so that a token can be traced to its reasoning step.
Rendering puts them together again exactly as the source had them: activations belong to that text and no other.
A corpus example is a record with neither steps nor answer; its text is the `question`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
FINAL_ANSWER = re.compile(rf"####\s*(-?{NUMBER})")
# A minus directly after a digit, letter or bracket is a subtraction, not a sign.
ANY_NUMBER = re.compile(rf"(?:(?<![\w)])-)?{NUMBER}")
ANNOTATION = re.compile(r"<<[^>]+>>")
EQUATION = re.compile(r"=\s*\d+")

SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("group", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("question", pa.string()),
        ("steps", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("answer_value", pa.float64()),
        ("n_steps", pa.int32()),
        ("stratum", pa.string()),
        ("meta", pa.string()),
    ]
)

QUESTION_STEP = -1
"""Step index of the question, and of everything outside the steps."""


def parse_gsm8k_answer(answer: str) -> tuple[tuple[str, ...], str, float | None]:
    """Split a GSM8K answer into (worked lines, final answer as written, its value).

    The value is the number after the last `####`, commas removed, else the last number in the text, else None.
    Without `####` every line is a worked line, and the final answer is the last number as written.
    """
    worked, marker, final = answer.rpartition("####")
    if not marker:
        worked, final = answer, ""
    lines = tuple(worked.removesuffix("\n").split("\n")) if worked else ()
    match = FINAL_ANSWER.search(marker + final)
    numbers = [match.group(1)] if match else ANY_NUMBER.findall(answer)
    text = final.strip() if marker else (numbers[-1] if numbers else "")
    return lines, text, float(numbers[-1].replace(",", "")) if numbers else None


def count_steps(solution: str) -> int:
    """Reasoning steps of a solution: its `<<...>>` annotations, or its `= number` where it has none."""
    return len(ANNOTATION.findall(solution)) or len(EQUATION.findall(solution))


def stratum_of(n_steps: int) -> str:
    """Difficulty by number of steps: `2-step` (up to two), `3-step`, `4-step`, `5+step`."""
    return "5+step" if n_steps >= 5 else f"{max(n_steps, 2)}-step"


def render(problem: Problem) -> tuple[str, list[tuple[int, int, int]]]:
    """The text a model reads, and where its parts lie.

    Returns the text and spans (step index, first character, one past the last). The question has index -1, the worked
    lines 0, 1, ..., and the `#### answer` line the number of worked lines. Newlines between parts belong to none.
    """
    parts = [problem.question, *problem.steps]
    if problem.answer:
        parts.append(f"#### {problem.answer}")
    spans, start = [], 0
    for index, part in enumerate(parts, start=QUESTION_STEP):
        spans.append((index, start, start + len(part)))
        start += len(part) + 1
    return "\n".join(parts), spans


def write_records(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems as Parquet with the columns of `SCHEMA`; `meta` becomes a JSON string with sorted keys."""
    rows = [asdict(p) | {"meta": json.dumps(p.meta, sort_keys=True, ensure_ascii=False)} for p in problems]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd")


def read_records(path: Path) -> list[Problem]:
    """Read what `write_records` wrote, in the same order."""
    return [
        Problem(**row | {"steps": tuple(row["steps"]), "meta": json.loads(row["meta"])})
        for row in pq.read_table(path, schema=SCHEMA).to_pylist()
    ]


def make_problem(
    example_id: str,
    dataset: str,
    question: str,
    *,
    group: str | None = None,
    answer: str = "",
    steps: Sequence[str] | None = None,
    meta: dict[str, Any] | None = None,
) -> Problem:
    """Build a record with its derived fields.

    `answer` is split where it has GSM8K's `####` line; given `steps` replace the lines found there. A text with neither
    answer nor steps is a corpus example: it has no steps and no stratum.
    """
    lines, final, value = parse_gsm8k_answer(answer)
    if "####" not in answer:
        lines, final = (), answer
    n_steps = count_steps("\n".join(lines) or final)
    if steps is not None:
        lines = tuple(steps)
        n_steps = count_steps("\n".join(lines)) or len(lines)
    return Problem(
        example_id=example_id,
        group=example_id if group is None else group,
        dataset=dataset,
        split="",
        question=question,
        steps=lines,
        answer=final,
        answer_value=value,
        n_steps=n_steps,
        stratum=stratum_of(n_steps) if lines or final else "",
        meta=meta or {},
    )


@dataclass(frozen=True)
class Problem:
    """One problem, or one text of a corpus."""

    example_id: str
    """Stable name, such as `gsm8k/train/17`."""
    group: str
    """Unit that a split may not cut."""
    dataset: str
    split: str
    """train, validation or test; empty until splits are assigned."""
    question: str
    """The question, or the whole text of a corpus example."""
    steps: tuple[str, ...]
    """Worked lines, without the final `####` line."""
    answer: str
    """Final answer as written; empty for a corpus example."""
    answer_value: float | None
    n_steps: int
    """Reasoning steps by annotation, which may differ from the number of worked lines."""
    stratum: str
    """`2-step` (up to two), `3-step`, `4-step`, `5+step`; empty for a corpus example."""
    meta: dict[str, Any] = field(default_factory=dict)
