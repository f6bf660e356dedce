"""Labels come from the worked lines, and reach the rows by example_id and step."""

import random

import pandas as pd
import pytest

from raysae.config.jobs import ProbeJob
from raysae.data.arithmetic import generate
from raysae.data.labels import LABELS, label_rows, part_labels, step_type
from raysae.data.records import make_problem
from raysae.errors import UserError

ANSWER = (
    "Ann reads 12 x 2 = <<12*2=24>>24 pages.\nBob reads 3 more pages than Ann, or 24+3=<<24+3=27>>27.\n"
    "The week has 7 days.\nThe rest is $1,200 - 2*27 = $<<1,200-2*27=1,146>>1,146.\n#### 1,146"
)


def arithmetic(n):
    return [make_problem(f"a/{i}", "arithmetic", p.question, answer=p.answer) for i, p in enumerate(generate(n, 0))]


def test_labels_of_a_worked_problem():
    parts = part_labels([make_problem("x", "gsm8k", "How many pages?", answer=ANSWER)]).set_index("step")
    assert parts["label_step_type"].tolist() == [
        "other", "equation", "comparison", "reasoning", "equation", "final_answer"
    ]  # fmt: skip
    assert parts["label_step"].fillna("").tolist() == ["", "0", "1", "2", "3", ""]
    assert parts["label_operation"].fillna("").tolist() == ["", "*", "+", "", "", ""]  # the last line mixes two
    assert parts["label_value"].notna().tolist() == [False, True, True, False, True, False]
    assert parts.loc[3, "label_value"] == "above 586.5"  # quartiles of 24, 27 and 1146: the comma is no decimal sign
    assert parts["label_answer"].notna().tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Ann is taller than Bob", "comparison"),
        ("She has 3 times as many dogs: 3*4=<<3*4=12>>12", "comparison"),
        ("He took the other one rather than this, so 1+1=<<1+1=2>>2", "equation"),
        ("She also bought a hat as well as a coat", "reasoning"),
        ("So x = 12", "equation"),
        ("There are 5 <<5=5>>5 cats", "equation"),  # the brackets of an annotation are no comparison
    ],
)
def test_types_of_lines(line, expected):
    assert step_type(line) == expected


def test_a_minus_that_is_a_sign_is_no_operation():
    lines = ["<<-5+3=-2>>-2", "<<8-3=5>>5", "<<50%*4=2>>2", "<<(2)*-3=-6>>-6"]
    parts = part_labels([make_problem("x", "toy", "?", answer="-6", steps=lines)])
    assert parts["label_operation"].tolist()[1:-1] == ["+", "-", "*", "*"]


def test_labels_agree_with_the_generator():
    problems = arithmetic(200)
    parts = part_labels(problems).set_index(["example_id", "step"])
    assert set(parts["label_operation"].dropna()) == {*"+-*/"}
    for p in problems:
        for step, line in enumerate(p.steps):
            operator = next(o for o in "+-*/" if o in line.split("<<")[1].split("=")[0])
            assert parts.loc[(p.example_id, step), "label_operation"] == operator
    shares = parts["label_value"].value_counts(normalize=True)
    assert len(shares) == 4 and shares.between(0.15, 0.35).all()


def test_labels_are_joined_by_id_and_never_by_the_order_of_a_list():
    problems = arithmetic(60)
    rng = random.Random(0)
    rows = [(p.example_id, step) for p in problems for step in range(-1, len(p.steps) + 1) for _ in range(2)]
    rng.shuffle(rows)
    table = pd.DataFrame(rows, columns=["example_id", "step"], index=range(100, 100 + len(rows)))
    labelled = label_rows(table, problems)
    assert labelled.index.equals(table.index) and labelled[["example_id", "step"]].equals(table)
    rng.shuffle(problems)
    pd.testing.assert_frame_equal(label_rows(table, problems), labelled)


def test_rows_without_a_part_and_ids_that_occur_twice_are_refused():
    problems = arithmetic(3)
    with pytest.raises(UserError, match="1 rows have no part there, such as step 9 of 'a/1'"):
        label_rows(pd.DataFrame({"example_id": ["a/0", "a/1"], "step": [0, 9]}), problems)
    with pytest.raises(UserError, match="'a/0' occurs twice"):
        label_rows(pd.DataFrame({"example_id": ["a/0"], "step": [0]}), [*problems, problems[0]])


def test_the_job_offers_every_label():
    assert ProbeJob.model_fields["labels"].default == LABELS


def test_a_corpus_has_no_labels_but_one_type():
    parts = part_labels([make_problem("t/0", "text", "Once upon a time.")])
    assert parts.drop(columns=["example_id", "step", "label_step_type"]).isna().all().all()
