"""Labels of token rows, for problems with worked lines: what a probe is asked to read.

A label belongs to a part of a problem (the question, a worked line, the `#### answer` line) and reaches the rows of that
part through `example_id` and `step`, never through the order of a list. Labels by name:

step        index of the worked line: 0, 1, 2, 3, `4+`
step_type   `final_answer` the `####` line; `comparison` a worked line that compares two quantities (more than, twice as,
            x > y), with or without a calculation; `equation` any other with a calculation; `reasoning` any other worked
            line; `other` the question
operation   the operator of the worked line's `<<...>>`: + - * /; lines that mix operators have none
value       quartile, over all worked lines, of the result of the line's `<<...>>`
answer      quartile, over all problems, of the final answer; on the question and the worked lines, which precede it

Rows that a label says nothing of have None. A label is of a line, so rows at or after a printed operator or result can read
it off the page; the token-identity probe shows how far the token alone goes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from raysae.data.records import ANNOTATION, EQUATION, QUESTION_STEP, Problem
from raysae.errors import UserError

LABELS = ("step", "step_type", "operation", "value", "answer")
KEY = ["example_id", "step"]
LAST_STEP = 4
CALCULATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
OPERATOR = re.compile(r"(?<=[\d.)%])[-+*/]")  # after a number or a bracket: elsewhere a minus is a sign
COMPARISON = re.compile(
    r"\b(?:more|less|fewer)\b.{0,40}?\bthan\b|\b(?!rather|other)\w+er than\b"
    r"|\b(?:times|twice|half) as\b|\bas (?!well|soon|long|far)\w+ as\b|[<>]",
    re.IGNORECASE,
)


def label_rows(rows: pd.DataFrame, problems: Sequence[Problem]) -> pd.DataFrame:
    """`rows` (columns example_id, step, ...) with a column `label_<name>` for each of LABELS; order and index stay.

    Raises UserError for an example_id that two problems have, and for rows of no known part.
    """
    parts = part_labels(problems)
    twice = parts.duplicated(KEY)
    if twice.any():
        raise UserError(f"records: example_id {parts.loc[twice, 'example_id'].iloc[0]!r} occurs twice; make ids unique")
    labelled = rows.merge(parts, on=KEY, how="left", validate="many_to_one", indicator="_known").set_index(rows.index)
    unknown = labelled[labelled["_known"] != "both"]
    if len(unknown):
        example, step = unknown[KEY].iloc[0]
        raise UserError(
            f"records: {len(unknown)} rows have no part there, such as step {step} of {example!r}; "
            "give the records that the store was made from"
        )
    return labelled.drop(columns="_known")


def part_labels(problems: Sequence[Problem]) -> pd.DataFrame:
    """One row per part of each problem: example_id, step, and `label_<name>` for each of LABELS."""
    parts = []
    for p in problems:
        last = len(p.steps)
        for step, text in enumerate(["", *p.steps, ""], start=QUESTION_STEP):
            operation, value = _calculation(text)
            parts.append(
                {
                    "example_id": p.example_id,
                    "step": step,
                    "label_step": None if step in (QUESTION_STEP, last) else str(step) if step < LAST_STEP else "4+",
                    "label_step_type": {QUESTION_STEP: "other", last: "final_answer"}.get(step) or step_type(text),
                    "label_operation": operation,
                    "label_value": value,
                    "label_answer": None if step == last else p.answer_value,
                }
            )
    made = pd.DataFrame(parts, columns=[*KEY, *(f"label_{name}" for name in LABELS)])
    answers = [p.answer_value for p in problems]
    made["label_answer"] = _quartile(made["label_answer"], answers)
    made["label_value"] = _quartile(made["label_value"], made["label_value"])
    return made


def step_type(line: str) -> str:
    """`comparison`, `equation` or `reasoning` of a worked line."""
    if COMPARISON.search(ANNOTATION.sub("", line)):
        return "comparison"
    return "equation" if ANNOTATION.search(line) or EQUATION.search(line) else "reasoning"


def _calculation(line: str) -> tuple[str | None, float | None]:
    """(operator, result) of a worked line's calculation; None for what it has not, or not one of."""
    found = CALCULATION.findall(line)
    operators = {operator for left, _ in found for operator in OPERATOR.findall(left.replace(" ", ""))}
    try:
        value = float(found[-1][1].replace(",", "")) if found else None
    except ValueError:  # such as 3/4 or 5%
        value = None
    return (operators.pop() if len(operators) == 1 else None), value


def _quartile(values: pd.Series, of: Sequence[float | None] | pd.Series) -> pd.Series:
    """Each value's bin among the quartiles of `of`, as text such as `14 to 44`; None where there is no value."""
    numbers = pd.to_numeric(pd.Series(of, dtype=object), errors="coerce").dropna()
    edges = np.unique(np.quantile(numbers, [0.25, 0.5, 0.75])) if len(numbers) else np.empty(0)
    shown = [f"{edge:g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in pairwise(shown)]
    names = [f"up to {shown[0]}", *between, f"above {shown[-1]}"] if shown else [""]
    given = pd.to_numeric(values, errors="coerce").to_numpy(float)
    bins = np.digitize(given, edges, right=True)
    return pd.Series([None if np.isnan(v) else names[b] for v, b in zip(given, bins, strict=True)], dtype=object)
