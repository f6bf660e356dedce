"""Records render to the source's own text, and keep what spec and Parquet promise."""

import json
from collections import Counter

import pytest

from raysae.data.records import (
    ANNOTATION,
    SCHEMA,
    count_steps,
    make_problem,
    parse_gsm8k_answer,
    read_records,
    render,
    stratum_of,
    write_records,
)

# Annotations per answer in the real files, counted independently.
ANNOTATIONS = {
    "train": {0: 95, 1: 404, 2: 2175, 3: 2137, 4: 1424, 5: 785, 6: 287, 7: 123, 8: 40, 9: 3},
    "test": {0: 18, 1: 65, 2: 357, 3: 364, 4: 290, 5: 138, 6: 57, 7: 21, 8: 9},
}


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_renders_byte_for_byte_and_counts_as_published(shared, split):
    counts = Counter()
    for row, line in enumerate((shared / f"data/gsm8k/{split}.jsonl").read_text().splitlines()):
        raw = json.loads(line)
        problem = make_problem(f"gsm8k/{split}/{row}", "gsm8k", raw["question"], answer=raw["answer"])
        text, spans = render(problem)
        assert text == raw["question"] + "\n" + raw["answer"]
        assert [text[start:end] for _, start, end in spans] == [raw["question"], *raw["answer"].split("\n")]
        assert [index for index, _, _ in spans] == list(range(-1, len(problem.steps) + 1))
        assert problem.answer_value == float(raw["answer"].split("####")[1].replace(",", ""))
        annotations = len(ANNOTATION.findall("\n".join(problem.steps)))
        assert problem.n_steps == annotations or annotations == 0
        counts[annotations] += 1
    assert counts == ANNOTATIONS[split]


@pytest.mark.parametrize(
    ("answer", "steps", "text", "value"),
    [
        ("a = <<1+1=2>>2\nso\n#### 1,234,567", ("a = <<1+1=2>>2", "so"), "1,234,567", 1234567.0),
        ("#### -3.5", (), "-3.5", -3.5),
        ("x\n####7", ("x",), "7", 7.0),
        ("first #### 1\n#### 2", ("first #### 1",), "2", 2.0),
        ("x\n#### $5", ("x",), "$5", 5.0),
        ("so 48-24 are left", ("so 48-24 are left",), "24", 24.0),
        ("it is -4", ("it is -4",), "-4", -4.0),
        ("none", ("none",), "", None),
    ],
)
def test_parse_gsm8k_answer(answer, steps, text, value):
    assert parse_gsm8k_answer(answer) == (steps, text, value)


def test_steps_are_counted_by_annotation_first():
    assert count_steps("a = 5 and <<1+2=3>>3") == 1
    assert count_steps("a = 5, b =6, c = x") == 2
    assert [stratum_of(n) for n in (0, 1, 2, 3, 4, 5, 9)] == ["2-step"] * 3 + ["3-step", "4-step", "5+step", "5+step"]


def test_a_corpus_text_renders_as_itself():
    text = "Once #### upon\n\na time, 3 = 3"
    problem = make_problem("t/0", "t", text)
    assert render(problem) == (text, [(-1, 0, len(text))])
    assert (problem.steps, problem.answer, problem.n_steps, problem.stratum) == ((), "", 0, "")


def test_an_answer_without_gsm8k_format_stays_whole():
    problem = make_problem("q/0", "q", "Where?", answer="In London, 3 rd street")
    assert render(problem)[0] == "Where?\n#### In London, 3 rd street"
    given = make_problem("q/1", "q", "Where?", answer="5", steps=["first", "then"])
    assert render(given)[0] == "Where?\nfirst\nthen\n#### 5"
    assert (given.n_steps, given.answer_value) == (2, 5.0)


def test_parquet_round_trip(tmp_path):
    problems = [
        make_problem("a/0", "a", "Wie viele €?\n😀", answer="1+1 = <<1+1=2>>2\n\n#### 2", meta={"b": [1], "a": "ü"}),
        make_problem("a/1", "a", "text only", group="g"),
    ]
    write_records(tmp_path / "records.parquet", problems)
    assert read_records(tmp_path / "records.parquet") == problems
    columns = "example_id, group, dataset, split, question, steps, answer, answer_value, n_steps, stratum, meta"
    assert columns.split(", ") == SCHEMA.names
