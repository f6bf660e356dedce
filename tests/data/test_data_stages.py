"""Records and tokens of a run: what did not become a row is said; a tokenizer that does not fit the model is refused."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from small import study
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from raysae.config.jobs import SweepJob
from raysae.data.tokens import read_block
from raysae.errors import UserError
from raysae.models.embedded import build_tokenizer
from raysae.studies.sweep import SweepStudy
from raysae.workspace import Made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 64 tokens and a tokenizer of more."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def study_of(
    tmp_path: Path, rows: list, model: Path | str = "embedded", capture: dict | None = None, **data: object
) -> SweepStudy:
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data |= {"source": "dataset", "path": str(tmp_path / "set.jsonl"), "validation_fraction": 0.3, "test_fraction": 0.3}
    return study(SweepJob(output=tmp_path / "out", model={"name": str(model)}, data=data, capture=capture or {}))


def test_what_did_not_become_a_row_is_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["Ada", "Ben", "Cleo", "Dan", "Emma", "Finn", "Gita", "Hugo"]
    rows = [{"question": f"{a} has 5 apples and {b} has 6 red stamps."} for a in names for b in names if a != b]
    rows += [{"question": None}, {"question": " "}, {"question": "<|endoftext|>"}, {"question": "Ada"}]
    rows += [{"question": " ".join([*names, "has", "apples"] * 3)}, {"question": ""}]
    made = study_of(tmp_path, rows, on_bad_row="skip", context_length=16)
    facts = made.workspace.make(made.records).manifest
    assert (facts["bad_rows"], facts["blank_rows"]) == (1, 2)
    assert facts["not_compared"] == pytest.approx(1 / 59), "one word is no shingle"
    tokens = made.workspace.make(made.tokens).manifest
    assert (tokens["dropped_empty"], tokens["dropped_too_long"], tokens["cut_starts"]) == (1, 1, 0)
    said = capsys.readouterr().out
    for line in (
        "records: 1 bad rows left out, the first",
        "records: 2 rows without text left out",
        "records: 1.7% of the texts are shorter than a shingle",
        "left out: 1 examples longer than 16; left out: 1 examples without a row",
    ):
        assert line in said, said
    made = study_of(tmp_path, rows, on_bad_row="skip", context_length=16, packing="concat")
    cut = made.workspace.make(made.tokens).manifest["cut_starts"]
    assert cut > 0 and f"left out: {cut} tokens at which a text was cut, no rows" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"row 56: data\.columns\.question holds None"):
        made = study_of(tmp_path, rows)
        made.workspace.make(made.records)
    assert len([*(tmp_path / "out/stages").glob("records-*")]) == 1, "nothing half-written"


def test_a_store_says_what_became_no_row_and_hangs_on_the_norm_ratio_and_the_model_s_config(
    tmp_path: Path, arithmetic_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(arithmetic_model, tmp_path / "model")
    names = ["Ada", "Ben", "Cleo", "Dan", "Emma", "Finn"]
    rows = [{"question": f"{a} has 5 apples and {b} has 6 red stamps."} for a in names for b in names if a != b]

    def store(**capture: object) -> Made:
        made = study_of(tmp_path, [*rows, {"question": None}], model, capture, on_bad_row="skip")
        return made.workspace.make(made.captured.store)

    plain = store(sites=["blocks.1.resid_post"])
    assert plain.manifest["left_out"] == {"bad rows": 1} and plain.manifest["not_compared"] == 0
    capsys.readouterr()
    cut = store(sites=["blocks.1.resid_post"], max_norm_ratio=1.05)
    dropped = cut.manifest["norm_outliers"]
    assert 0 < dropped == sum(plain.manifest["rows"].values()) - sum(cut.manifest["rows"].values())
    said = f"{dropped} rows of more than 1.05 times the median norm"
    assert (
        cut.manifest["left_out"][said.partition(" ")[2]] == dropped and f"left out: {said}" in capsys.readouterr().out
    )

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-2}))
    edited = store(sites=["blocks.1.resid_post"])
    assert not edited.reused and edited.path != plain.path, "an edited config is another model"
    shutil.copy(model / "model.safetensors", model / "optimizer.safetensors")
    assert store(sites=["blocks.1.resid_post"]).reused, "a file that is not loaded is no part of it"


def test_a_tokenizer_that_does_not_fit_the_model_is_one_line_before_anything_is_captured(
    tmp_path: Path, model: Path
) -> None:
    rows = [{"question": f"{a} has {i} apples."} for i, a in enumerate(["Ada", "Ben", "Cleo", "Dan", "Emma"] * 3)]
    for _ in range(2):  # from a fresh stage, and from a finished one
        made = study_of(tmp_path, rows, model, near_duplicate_similarity=None)
        with pytest.raises(
            UserError, match=r"^model\.tokenizer: .* makes token \d+, .* has 64 rows; name the model's own"
        ):
            made.prepare()
        with pytest.raises(UserError, match=r"^model\.tokenizer: "):
            made.workspace.make(made.captured.store)
        assert not [*(tmp_path / "out/stages").glob("store-*")]
    tokens = made.workspace.make(made.tokens)
    blocks = [read_block(tokens.path / block["file"]) for block in tokens.manifest["blocks"]]
    largest = max(int(ids.max()) for block in blocks for ids in block.input_ids)
    assert tokens.manifest["largest_id"] == largest
    config = AutoConfig.from_pretrained(model)
    for rows_of_it, fits in ((largest, False), (largest + 1, True)):
        config.vocab_size = rows_of_it
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(fits))
        build_tokenizer().save_pretrained(tmp_path / str(fits))
        said = pytest.raises(UserError, match=f"makes token {largest}, .* has {largest} rows")
        with contextlib.nullcontext() if fits else said:
            study_of(tmp_path, rows, tmp_path / str(fits), near_duplicate_similarity=None).prepare()
