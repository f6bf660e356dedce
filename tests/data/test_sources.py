"""Sources yield the same records however much of them is kept, and name what is wrong with a file."""

import json
import re

import pandas as pd
import pytest

from raysae.data.records import render
from raysae.data.sources import LeftOut, load_problems
from raysae.errors import UserError

STORY = r"(?<!\n)\n(?!\n)"
GOOD = json.dumps({"question": "q?", "answer": "1 = <<1=1>>1\n#### 1"})


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write(tmp_path):
    def write_lines(name, *lines):
        path = tmp_path / name
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return write_lines


def test_gsm8k_from_file_and_folder_agree_and_sample_keeps_ids(shared):
    whole = load_problems("gsm8k", str(shared / "data/gsm8k/test.jsonl"))
    assert len(whole) == 1319
    assert [p.example_id for p in whole[:2]] == ["gsm8k/test/0", "gsm8k/test/1"]
    assert load_problems("gsm8k", "gsm8k", hub_split="test", base_dir=shared / "data") == whole

    sample = load_problems("gsm8k", str(shared / "data/gsm8k/test.jsonl"), examples=50, seed=3)
    by_id = {p.example_id: p for p in whole}
    rows = [int(p.example_id.rpartition("/")[2]) for p in sample]
    assert rows == sorted(set(rows)) and len(rows) == 50
    assert all(by_id[p.example_id] == p for p in sample)
    assert sample == load_problems("gsm8k", str(shared / "data/gsm8k/test.jsonl"), examples=50, seed=3)
    assert sample != load_problems("gsm8k", str(shared / "data/gsm8k/test.jsonl"), examples=50, seed=4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"question": "q?", "answer"', "not valid JSON"),
        ('{"question": "q?"}', "key 'answer' is missing"),
        ('{"question": 5, "answer": "#### 1"}', "key 'question' holds 5"),
        ("[1, 2]", r"holds \[1, 2\]"),
    ],
)
def test_a_malformed_gsm8k_line_is_named(write, bad, message):
    path = write("train.jsonl", GOOD, "", GOOD, bad, GOOD)  # the blank line is skipped, and counted
    with pytest.raises(UserError, match=re.escape(f"{path}:4: ") + message) as raised:
        load_problems("gsm8k", path)
    assert "\n" not in str(raised.value)


NULLS = [{"question": "a?"}, {"question": None}, {"question": " "}, {"question": 5}, {"question": "b?"}]
LONE = r'{"question": "half \ud800 of one", "answer": "#### 1"}'


def test_bad_rows_stop_or_are_left_out_and_counted(write):
    path = write("set.jsonl", *map(json.dumps, NULLS))
    with pytest.raises(UserError, match=r"row 1: data\.columns\.question holds None; .* data\.on_bad_row skip"):
        load_problems("dataset", path)
    left_out = LeftOut(skip=True)
    assert [p.example_id for p in load_problems("dataset", path, left_out=left_out)] == ["set/0", "set/4"]
    assert (len(left_out.bad), left_out.blank) == (2, 1)
    assert left_out.lines()[0].startswith(
        f"2 bad rows left out, the first {path} row 1: data.columns.question holds None"
    )
    assert left_out.lines()[1] == "1 rows without text left out"

    path = write("train.jsonl", GOOD, "[1]", LONE, "{", '{"question": "q?", "answer": null}', GOOD, "[" * 10**5)
    left_out = LeftOut(skip=True)
    assert len(load_problems("gsm8k", path, left_out=left_out)) == 2
    places = [re.match(r".*train\.jsonl:(\d)", line)[1] for line in left_out.bad]
    assert sorted(places) == ["2", "3", "4", "5", "7"]
    with pytest.raises(UserError, match=r"no example in .*, and 1 bad rows left out, the first .*:1: holds"):
        load_problems("gsm8k", write("bad.jsonl", "[1]"), left_out=LeftOut(skip=True))


@pytest.mark.parametrize("source", ["gsm8k", "dataset"])
def test_half_a_character_is_named(write, source):
    path = write("train.jsonl", GOOD, LONE)
    with pytest.raises(UserError, match=r"train\.jsonl:2: \\ud800 is half of a character") as caught:
        load_problems(source, path)
    assert "\n" not in str(caught.value)
    pair = write("pair.jsonl", r'{"question": "\ud83d\ude00", "answer": "#### 1"}')
    assert load_problems(source, pair)[0].question == "😀"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.txt", "train.csv", "train.json"])
def test_a_file_that_is_not_utf8_is_one_line(tmp_path, encoding, name):
    lines = {"train.csv": ["question", "é?", "b?"]}.get(name, ['{"question": "é?", "answer": "#### 1"}'])
    (tmp_path / name).write_text("\n".join(lines), encoding=encoding)
    with pytest.raises(UserError, match=rf"{name}.*({'UTF-8|utf-8'})") as caught:
        load_problems("text" if name.endswith("txt") else "dataset", str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path, write):
    empty = write("empty.jsonl", "")
    for arguments, message in [
        ({"source": "gsm8k", "path": str(tmp_path / "no.jsonl")}, "data.path: no file .*no.jsonl"),
        ({"source": "gsm8k", "path": str(tmp_path), "hub_split": "test"}, "data.path: no file .*test.jsonl"),
        ({"source": "gsm8k", "path": empty}, "data.path: no example in .*empty.jsonl"),
        ({"source": "text"}, "data.path: not set"),
        ({"source": "text", "path": str(tmp_path / "no")}, "data.path: no file or folder"),
        ({"source": "text", "path": empty}, "data.path: no example"),
        ({"source": "text", "path": empty, "text_separator": "("}, "data.text_separator"),
        ({"source": "dataset"}, "data.path: not set"),
        ({"source": "dataset", "path": str(tmp_path / "no.csv")}, "data.path: no file"),
        ({"source": "dataset", "path": empty}, "data.path: no row"),
        (
            {"source": "dataset", "path": write("a.xml", "")},
            r"data.path: .* is not a .json, .jsonl, .csv, .parquet file",
        ),
        ({"source": "dataset", "path": "no-such/name"}, "data.path: cannot load no-such/name"),
        ({"source": "dataset", "path": write("broken.json", "{]")}, "data.path: cannot load .*broken.json"),
        ({"source": "web"}, "data.source: 'web'"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            load_problems(**arguments)
        assert "\n" not in str(raised.value)


def test_text_is_cut_at_the_pattern_and_nothing_is_lost(write):
    path = write("stories.txt", "One.", "", "Still one.", "Two.", "", "", "Three, é.", "", "")
    stories = load_problems("text", path, text_separator=STORY, text_replace=("\n\n", "\n"))
    assert [p.question for p in stories] == ["One.\nStill one.", "Two.\n\nThree, é."]
    # A pattern's groups are no examples, as they would be with re.split.
    assert [p.question for p in load_problems("text", path, text_separator=r"(\n)+|(, )")] == [
        "One.",
        "Still one.",
        "Two.",
        "Three",
        "é.",
    ]


def test_tinystories_opens_as_its_model_expects(shared):
    stories = load_problems(
        "text",
        str(shared / "data/tinystories_text/tiny_stories.txt"),
        text_separator=STORY,
        text_replace=("\n\n", "\n"),
    )
    assert len(stories) == 1097
    assert stories[1].question.startswith("Once upon a time, there was a little car named Beep.")
    assert stories[1].example_id == "tiny_stories/1"
    assert not any("\n\n" in p.question for p in stories[:100])


def test_a_folder_of_texts_has_unique_ids(tmp_path):
    for name in ("b/one.txt", "a/one.txt", "two.txt"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text(f"{name} first\n\n{name} second\n")
    texts = load_problems("text", "corpus", base_dir=tmp_path)
    ids = [p.example_id for p in texts]
    assert ids[:2] == ["corpus/a/one/0", "corpus/a/one/1"] and len(set(ids)) == 6
    assert texts[1].question == "a/one.txt second"


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_every_local_format_gives_the_same_records(tmp_path, suffix):
    frame = pd.DataFrame(
        {
            "id": [7, 8, 9],
            "problem": ["a?", " ", "c, d?"],
            "result": ["x\n#### 1,000", "-", "no"],
            "who": ["u", "u", "v"],
        }
    )
    path = tmp_path / f"set.{suffix}"
    match suffix:
        case "csv":
            frame.to_csv(path, index=False)
        case "parquet":
            frame.to_parquet(path)
        case _:
            frame.to_json(path, orient="records", lines=suffix == "jsonl")
    columns = {"question": "problem", "answer": "result", "group": "who", "example_id": "id", "steps": None}
    first, second = load_problems("dataset", str(path), columns=columns)  # the blank question is dropped
    assert (first.example_id, first.group, first.steps, first.answer_value) == ("7", "u", ("x",), 1000.0)
    assert render(second)[0] == "c, d?\n#### no"
    assert [p.example_id for p in load_problems("dataset", str(path), columns={"question": "problem"})] == [
        "set/0",
        "set/2",
    ]


def test_a_folder_is_read_by_split_and_its_path_is_no_id(tmp_path):
    (tmp_path / "pairs").mkdir()
    pd.DataFrame({"text": ["a", "b"]}).to_csv(tmp_path / "pairs/train.csv", index=False)
    columns = {"question": "text"}
    texts = load_problems("dataset", "pairs", columns=columns, base_dir=tmp_path)
    assert [p.example_id for p in texts] == ["pairs/train/0", "pairs/train/1"]
    with pytest.raises(UserError, match=r"data.path: cannot load .*split test"):
        load_problems("dataset", "pairs", columns=columns, base_dir=tmp_path, hub_split="test")


def test_real_step_lists_are_read(shared):
    chosen = load_problems(
        "dataset",
        str(shared / "data/prosqa/prosqa_valid.json"),
        columns={"question": "question", "answer": "answer", "steps": "steps"},
    )
    raw = json.loads((shared / "data/prosqa/prosqa_valid.json").read_text())
    assert [list(p.steps) for p in chosen] == [row["steps"] for row in raw]
    assert [p.n_steps for p in chosen] == [len(row["steps"]) for row in raw]


def test_wrong_columns_and_values_are_named(write):
    rows = [{"question": "a?", "n": 1, "s": ["x"]}, {"question": "b?", "n": None, "s": "x\ny"}, {"question": None}]
    path = write("set.jsonl", *map(json.dumps, rows[:2]))
    for columns, message in [
        ({"question": "text"}, "data.columns.question: no column 'text' in .*; it has question, n, s"),
        ({"question": "question", "answer": "label"}, "data.columns.answer: no column 'label'"),
        ({"question": "question", "group": "n"}, "row 1: data.columns.group holds None"),
        ({"question": "question", "steps": "n"}, "row 0: data.columns.steps holds 1"),
        ({"question": "n"}, "row 0: data.columns.question holds 1"),
    ]:
        with pytest.raises(UserError, match=message):
            load_problems("dataset", path, columns=columns)
    with pytest.raises(UserError, match=r"row 2: data.columns.question holds None"):
        load_problems("dataset", write("none.jsonl", *map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"data.columns.example_id: 'a' occurs 2 times"):
        twice = write("twice.jsonl", *[json.dumps({"question": q, "id": "a"}) for q in "pq"])
        load_problems("dataset", twice, columns={"question": "question", "example_id": "id"})


def test_arithmetic_is_generated_and_seeded():
    problems = load_problems("arithmetic", examples=40, seed=5)
    assert len(problems) == 40 and all(p.n_steps >= 1 and p.answer_value is not None for p in problems)
    assert problems == load_problems("arithmetic", examples=40, seed=5)
    other = load_problems("arithmetic", examples=40, seed=6)
    assert not {p.example_id for p in problems} & {p.example_id for p in other}
