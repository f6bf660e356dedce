"""Waivers and the basis: nothing goes on over a no-go unless a person answers for exactly that, and it is shown."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from small import reseal, study

from raysae.config.jobs import SweepJob
from raysae.config.load import validate
from raysae.errors import UserError
from raysae.gates.criteria import Gate
from raysae.gates.waivers import in_words, load_waiver, read_basis

ROOT = Path(__file__).parents[2]
GATE = Gate.model_validate({"name": "toy", "criteria": [
    {"criterion": "latents are alive", "metric": "dead_fraction", "op": "<=", "threshold": 0.2, "why": "so"},
    {"criterion": "the code is sparse", "metric": "l0", "op": "<=", "threshold": 9, "why": "so"},
]})  # fmt: skip


def waiver_file(tmp_path, **fields):
    file = tmp_path / "waiver.yaml"
    file.write_text(yaml.safe_dump({"waived_by": "A. Person", "why": "the width is fixed by a replication", **fields}))
    return file


def earlier_run(tmp_path, verdict="no-go", name="phase1", **fields):
    """An earlier run's folder; verdict None leaves no decision."""
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    if verdict:
        decision = {"verdict": verdict, "reason": "No SAE passes the gate.", "criteria": [], **fields}
        (folder / "decision.json").write_text(json.dumps(decision))
        reseal(folder)
    return folder


@pytest.mark.parametrize(
    "fields,said",
    [
        (
            {"criteria": ["latents are alife"]},
            ("no criterion 'latents are alife'", "did you mean 'latents are alive'?"),
        ),
        ({"criteria": ["the code is sparse"]}, ("the code is sparse", "upper bound on l0 or l0_fraction must stay")),
        ({}, ("criteria or run must say what is waived",)),
        ({"criteria": []}, ("criteria or run must say what is waived",)),
        ({"criteria": ["latents are alive"], "why": " "}, ("why", "at least 1 character")),
        ({"criteria": ["latents are alive"], "waived_by": None}, ("waived_by", "valid string")),
        ({"criteria": ["latents are alive"], "by": "me"}, ("by: unknown field", "did you mean")),
        ({"run": "phase1"}, ("run phase1 is waived, but no basis is given",)),
    ],
)
def test_a_mistake_in_a_waiver_is_one_line(tmp_path, fields, said):
    file = waiver_file(tmp_path, **fields)
    with pytest.raises(UserError) as caught:
        load_waiver(file, GATE, None)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message
    for part in said:
        assert part in message


def test_a_gate_that_chooses_nothing_may_have_each_criterion_waived(tmp_path):
    file = waiver_file(tmp_path, criteria=["the code is sparse"])
    study = Gate.model_validate({**GATE.model_dump(), "choose": None})
    assert load_waiver(file, study, None).criteria == ("the code is sparse",)


def test_a_waiver_is_for_the_run_that_it_names(tmp_path):
    file = waiver_file(tmp_path, run="phase1")
    assert load_waiver(file, GATE, tmp_path / "phase1").run == "phase1"
    with pytest.raises(UserError, match="run phase1 is waived, but the basis is phase0"):
        load_waiver(file, GATE, tmp_path / "phase0")
    with pytest.raises(UserError, match=r"waiver: .*none\.yaml is not a file"):
        load_waiver(tmp_path / "none.yaml", GATE, None)


def test_an_unmeasured_subject_is_waived_by_its_words(tmp_path):
    gate = Gate.model_validate({**GATE.model_dump(), "unmeasured": [{"subject": "purity of latents", "why": "later"}]})
    assert load_waiver(waiver_file(tmp_path, criteria=["purity of latents"]), gate, None).criteria == (
        "purity of latents",
    )
    with pytest.raises(UserError, match="did you mean 'purity of latents'"):
        load_waiver(waiver_file(tmp_path, criteria=["purity of latent"]), gate, None)


def test_a_gate_job_shows_every_site(tmp_path, monkeypatch, capsys):
    criterion = {
        "criterion": "latents are alive", "metric": "dead_fraction", "op": "<=", "threshold": 0.2, "value": 0.1,
        "verdict": "pass", "reason": "", "split": "training",
    }  # fmt: skip
    score = {"name": "FVU · L0", "validation": None, "test": {"value": 0.4, "in_words": "FVU 0.1 × L0 4 = 0.4"}}
    choice = {
        "chosen": "x", "closest": None, "criteria": [criterion], "score": score,
        "candidates": [{"in_words": "FVU 0.09 × L0 4 = 0.36"}], "runner_up": {"sae_id": "y", "why": "L0 ×2 for FVU ×0.9"},
    }  # fmt: skip
    none = {"chosen": None, "closest": "z", "criteria": [{**criterion, "value": None}], "score": score}
    folder = earlier_run(tmp_path, "go", choices={"blocks.0": choice, "blocks.1": none})
    assert script("gate.py", folder, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "blocks.0: x" and shown[1] == "pass    dead_fraction 0.1 <= 0.2  latents are alive, training"
    assert shown[2] == "blocks.1: z" and "dead_fraction nan" in shown[3] and shown[4].startswith("GO: ")
    assert shown[5] == "blocks.0: x, FVU 0.09 × L0 4 = 0.36; on test FVU 0.1 × L0 4 = 0.4"
    assert shown[6] == "  runner-up y: L0 ×2 for FVU ×0.9" and len(shown) == 7


def test_a_go_is_a_basis(tmp_path):
    folder = earlier_run(tmp_path, "go")
    assert read_basis(folder, None) == {"path": str(folder), "verdict": "go"}


@pytest.mark.parametrize(
    "verdict,said",
    [
        ("no-go", "is a no-go: No SAE passes the gate."),
        ("incomplete", "is incomplete: No SAE passes the gate."),
        (None, "has no decision.json"),
    ],
)
def test_a_no_go_or_no_decision_is_a_basis_only_with_a_waiver_for_it(tmp_path, verdict, said):
    folder = earlier_run(tmp_path, verdict)
    unrelated = load_waiver(waiver_file(tmp_path, criteria=["latents are alive"]), GATE, folder)
    for waiver in (None, unrelated):
        with pytest.raises(UserError) as caught:
            read_basis(folder, waiver)
        message = str(caught.value)
        assert message.startswith(f"basis: {folder} {said}") and "a waiver with run: phase1" in message
    waiver = load_waiver(waiver_file(tmp_path, run="phase1"), GATE, folder)
    assert read_basis(folder, waiver) == {"path": str(folder), "verdict": verdict}


def test_a_basis_must_be_there(tmp_path):
    waiver = load_waiver(waiver_file(tmp_path, run="phase1"), GATE, tmp_path / "phase1")
    with pytest.raises(UserError, match=r"basis: .*phase1 is not a folder"):
        read_basis(tmp_path / "phase1", waiver)


# ----------------------------------------------------------------------------------------------------------------------
# The jobs


def script(name, *argv, monkeypatch):
    """Exit status of a job."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "jobs" / name), run_name="__main__")
    return caught.value.code


def test_the_job_refuses_a_no_go_basis_before_anything_is_written(tmp_path, monkeypatch, capsys):
    folder, output = earlier_run(tmp_path), tmp_path / "results"
    assert script("sweep_sae.py", "--basis", folder, "--output", output, monkeypatch=monkeypatch) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"error: basis: {folder} is a no-go") and "\n" not in line
    assert not output.exists()


def test_what_is_waived_makes_another_run(tmp_path):
    """Its folder belongs to gate, waiver and basis, by content: a run's decision never speaks of another waiver."""
    folder = earlier_run(tmp_path)

    def directory(**fields):
        return study(validate(SweepJob, {"output": str(tmp_path / "results"), **fields})).directory

    file = waiver_file(tmp_path, run="phase1")
    given = {"basis": str(folder), "waiver": str(file)}
    first = directory(**given)
    assert first == directory(**given) and first != directory()
    waiver_file(tmp_path, run="phase1", why="another reason")
    assert directory(**given) != first
    waiver_file(tmp_path, run="phase1")
    earlier_run(tmp_path, "go")
    assert directory(**given) != first


@pytest.mark.parametrize("verdict,status", [("go", 0), ("no-go", 3), ("incomplete", 3)])
def test_the_gate_job_prints_waivers_and_keeps_its_status(tmp_path, verdict, status, monkeypatch, capsys):
    waiver = load_waiver(waiver_file(tmp_path, criteria=["latents are alive"]), GATE, None)
    line = "waived: latents are alive, by A. Person, because the width is fixed by a replication"
    criterion = {
        "criterion": "latents are alive", "metric": "dead_fraction", "op": "<=", "threshold": 0.2, "value": math.nan,
        "verdict": "waived", "reason": "dead_fraction nan, must be <= 0.2",
    }  # fmt: skip
    folder = earlier_run(tmp_path, verdict, criteria=[criterion], waiver=waiver.model_dump(mode="json"))
    assert script("gate.py", folder, monkeypatch=monkeypatch) == status
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("waived") and shown[0].endswith(", validation (dead_fraction nan, must be <= 0.2)")
    assert shown[1].startswith(verdict.upper()) and shown[2:] == [line]
    earlier_run(tmp_path, verdict)
    assert script("gate.py", folder, monkeypatch=monkeypatch) == status
    assert "waived" not in capsys.readouterr().out


def test_a_waiver_in_words_names_the_run_too():
    waiver = {"waived_by": "A", "why": "so", "criteria": ["a", "b"], "run": "phase1"}
    assert in_words({"waiver": waiver}) == "waived: a; b; the decision of phase1, by A, because so"
    assert in_words({}) is None and in_words({"waiver": None}) is None
