"""Damage to any file of a finished run is one line that names it, or a rerun repairs it; never a result with it in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from small import reseal, small_job, small_values, study, timeless, write_config

import raysae
from raysae import cli, run_folder
from raysae.artifacts import fingerprint
from raysae.errors import Damaged, UserError
from raysae.files import compare, read_json, read_sealed, write_json, write_sealed
from raysae.on_ray.bench import RayBench
from raysae.report import write_report
from raysae.run import Run
from raysae.seal import SEAL, check, seal

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "sweep": {"architectures": ["topk"], "expansion_factors": [2]}, "training": {"tokens": 5000, "rungs": 1},
    "data": {"examples": 200}, "evaluation": {"max_tokens": 300, "bootstrap": 20}, "capture": {"rows_per_shard": 40_000},
}  # fmt: skip


def middle(content: bytes, put: Callable[[int], int]) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([put(content[at])]) + content[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "a flipped bit": lambda content: middle(content, lambda byte: byte ^ 1),
    "empty": lambda content: b"",
    "a list": lambda content: b"[]",
    "another type": lambda content: b'{"a": 1}\n',
}


@contextmanager
def damaged(file: Path, how: str) -> Iterator[None]:
    content = file.read_bytes()
    file.write_bytes(DAMAGE[how](content))  # in place: a file of a run may be a link to a stage's
    try:
        yield
    finally:
        file.write_bytes(content)


@contextmanager
def names(file: Path) -> Iterator[None]:
    """Expects one line that names `file`."""
    with pytest.raises(UserError) as caught:
        yield
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def run(ray_cluster, arithmetic_model, tmp_path_factory) -> Run:
    return raysae.run_sweep(small_job(arithmetic_model, tmp_path_factory.mktemp("results"), **TINY))


@pytest.fixture
def again(run, arithmetic_model, tmp_path) -> Callable[..., None]:
    """The same command, in this process; what would have to start Ray fails."""
    config = write_config(tmp_path / "job.yaml", small_values(arithmetic_model, run.path.parent, **TINY))
    main = cli.sweep
    return lambda *arguments: main(["--config", str(config), *arguments])


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(RayBench, "cluster", property(lambda self: pytest.fail("work was begun")))


def files_of(folder: Path) -> list[Path]:
    unread = {folder / "tune", folder / "attempts"}
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and not unread & {file, *file.parents}]
    return [file for file in found if not file.is_symlink()]


def stages_of(run: Run) -> list[Path]:
    return [run.path.parent / "stages" / name for name in run.sealed["stages"]]


def verify(folder: Path) -> None:
    compare(folder, read_sealed(folder / "manifest.json")["files"])


def test_every_file_of_every_stage_is_covered(run):
    for folder in stages_of(run):
        verify(folder)
        for file in files_of(folder):
            for how in DAMAGE:
                with damaged(file, how), names(file):
                    verify(folder)


def test_the_job_stops_at_a_damaged_stage(run, again, nothing_starts):
    """The first file of each, and its manifest: by its hash with --verify, by its size always."""
    again("--verify")
    for folder in stages_of(run):
        for file in (folder / "manifest.json", files_of(folder)[0]):
            with damaged(file, "a flipped bit"), names(file):
                again("--verify")
            with damaged(file, "half"), names(file):
                again()
    check(run.path, every_hash=True)


def test_no_reader_takes_a_run_with_damage_in_it(run, tmp_path, nothing_starts):
    gate, bundle, replicate, probe = (getattr(cli, name) for name in ("gate", "bundle", "replicate", "probe"))
    for file in files_of(run.path):
        for how in DAMAGE:
            with damaged(file, how):
                if how == "a flipped bit":  # what sizes do not tell
                    with names(file):
                        bundle([str(run.path), "--to", str(tmp_path / "run.tar.gz")])
                    with names(file):
                        replicate([str(run.path), "--output", str(tmp_path / "again")])
                if file.parent == run.path or how != "a flipped bit":  # deeper ones are not read by it
                    with names(file):
                        gate([str(run.path)])
        if file.parent == run.path or file.is_relative_to(run.path / "saes" / str(run.best)):
            with damaged(file, "half"), names(file):
                probe([str(run.path), "--labels", "operation"])
    assert list(tmp_path.iterdir()) == []


def test_a_rerun_repairs_the_run_s_folder(run, again, nothing_starts, capsys):
    right = {name: (run.path / name).read_bytes() for name in ("decision.json", "table.parquet", "seal.json")}
    decision = json.loads(right["decision.json"])
    forged = json.dumps({**decision, "verdict": "go"}, indent=1)
    (run.path / "decision.json").write_text(forged.ljust(len(right["decision.json"])))
    (run.path / "table.parquet").unlink()
    (run.path / "notes").write_text("mine")
    again()
    assert "decision.json does not match its sha256" in capsys.readouterr().out
    assert (
        timeless(read_json(run.path / "decision.json")) == timeless(decision)
        and (run.path / "notes").read_text() == "mine"
    )
    assert (run.path / "table.parquet").read_bytes() == right["table.parquet"]
    (run.path / SEAL).write_text("[]")
    (run.path / "report.html").write_text("")
    again()
    check(run.path, every_hash=True)
    assert (run.path / "report.html").stat().st_size and (run.path / "notes").exists()
    before = (run.path / SEAL).stat().st_mtime_ns
    again("--verify")
    assert (run.path / SEAL).stat().st_mtime_ns == before
    (run.path / "notes").unlink()
    again("--budget.tokens", "100000000")
    assert not (run.path / "notes").exists() and Run.open(run.path, verify=True).ledger["budget"]["tokens"]["limit"]


# ----------------------------------------------------------------------------------------------------------------------
# Without a run: whose a folder is, and how it is written


@pytest.fixture
def job(arithmetic_model, tmp_path) -> raysae.SweepJob:
    """A job on its own copies of data and model, under a given name; nothing has been run."""
    (tmp_path / "data.txt").write_text("one text\n\nanother text\n")
    (tmp_path / "model").mkdir()
    for file in arithmetic_model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    data = {"source": "text", "path": str(tmp_path / "data.txt")}
    return small_job(tmp_path / "model", tmp_path / "results", data=data, run="mine")


def finished(job: raysae.SweepJob) -> Path:
    """A folder as a run of the job leaves it."""
    mine = study(job)
    mine.directory.mkdir(parents=True)
    write_json(mine.directory / "identity.json", mine.identity())
    seal(mine.directory, [], fingerprint(mine.identity()))
    study(job)
    return mine.directory


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_what_a_run_was_made_from_belongs_to_it(job, tmp_path):
    finished(job)
    data, tokenizer = tmp_path / "data.txt", tmp_path / "model" / "tokenizer.json"
    for file, old, new, what in (
        (data, "one text", "One text", "data.path"),
        (tmp_path / "model" / "config.json", '"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 1e-04', "model.name"),
        (tokenizer, '"truncation": null', '"truncation": {"direction": "Right", "max_length": 9, "strategy": '
         '"LongestFirst", "stride": 0}', "model.tokenizer"),
    ):  # fmt: skip
        content = file.read_text()
        edit(file, old, new)
        with pytest.raises(UserError, match=rf"^run: .*mine was made from other content of {what}; ") as caught:
            study(job)
        assert "\n" not in str(caught.value)
        assert study(job.model_copy(update={"run": None})).directory.name != "mine"
        file.write_text(content)
    study(job)


def test_a_basis_that_is_not_what_was_written_is_refused(folder, job):
    decision = (folder / "decision.json").read_text()
    (folder / "decision.json").write_text(decision.replace('"no-go"', '"go"   '))
    with names(folder / "decision.json"):
        study(job.model_copy(update={"basis": folder}))


def test_a_folder_whose_identity_is_damaged_is_the_seal_s(job):
    folder = finished(job)
    (folder / "identity.json").write_text("{")
    study(job)
    (folder / SEAL).write_text("[]")
    with pytest.raises(
        Damaged, match=r"identity\.json: is not JSON; delete .*mine and run again, or give another --run"
    ):
        study(job)
    with pytest.raises(UserError, match="belongs to another config"):
        (folder / SEAL).unlink()
        write_json(folder / "identity.json", {"another": 1})
        study(job)


def test_a_kill_while_the_first_file_is_written_leaves_the_folder_free(job):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    root = Path(job.output)
    (root / "mine").mkdir(parents=True)
    (root / "mine" / f".identity.json.{ended.pid}.tmp").write_text("{")
    (root / f".mine.{ended.pid}.tmp").mkdir()
    study(job)
    assert [path.name for path in root.iterdir()] == ["mine"]
    (root / "mine" / "notes").write_text("")
    with pytest.raises(UserError, match="is not empty and no run of raysae"):
        study(job)


@pytest.mark.parametrize("name", ["../evil", "/abs", "a/b", "x" * 300, "..", "", "a\n", "stages", "looks"])
def test_a_run_s_name_is_one_folder_s(job, name):
    with pytest.raises(UserError, match=r"^run: ") as caught:
        study(job.model_copy(update={"run": name}))
    assert "\n" not in str(caught.value) and not Path(job.output).exists()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sealed run's folder, as far as its report and readers need it."""
    made = tmp_path / "results" / "mine"
    run_folder.write(made, made.parent, ["a-1"], "", lambda path: minimal(path, "first"))
    return made


def minimal(path: Path, words: str) -> None:
    table = pd.DataFrame({"sae_id": ["one"], "site": ["s"], "status": ["error"], "status_reason": [words]})
    table.to_parquet(path / "table.parquet")
    write_json(path / "decision.json", {"verdict": "no-go", "reason": words, "chosen": None, "closest": None})
    write_json(path / "ledger.json", {"stages": [{"stage": "a", "directory": "a-1"}]})


def test_a_run_that_ends_while_it_is_written_leaves_the_old_one(folder):
    def end(path: Path) -> None:
        write_json(path / "table.json", {})
        raise KeyboardInterrupt

    before = {file.name: file.read_bytes() for file in files_of(folder)}
    with pytest.raises(KeyboardInterrupt):
        run_folder.write(folder, folder.parent, ["a-1"], "", end)
    assert {file.name: file.read_bytes() for file in files_of(folder)} == before
    assert {path.name for path in folder.parent.iterdir()} == {"mine", "stages"}
    run_folder.write(folder, folder.parent, ["a-1"], "", lambda path: minimal(path, "second"))
    run = Run.open(folder, verify=True)
    assert run.decision["reason"] == run.table["status_reason"][0] == "second" and "second" in run.report.read_text()


def test_what_a_later_job_added_stays_with_the_stages_it_is_of(folder, capsys):
    def stands() -> bool:
        return run_folder.stands(folder, ["a-1"])

    held = os.open(folder / "decision.json", os.O_RDONLY)
    run_folder.add(folder, lambda path: write_json(path / "more.json", {"a": 1}), ["more.json"])
    assert os.read(held, 9) and check(folder, every_hash=True)["added"] == ["more.json"] and stands()
    (folder / "mine").mkdir()
    (folder / "mine" / "notes").write_text("mine")
    (folder / "elsewhere").symlink_to(folder.parent)
    (folder / "decision.json").unlink()
    assert not stands()
    run_folder.write(folder, folder.parent, ["a-1"], "", lambda path: minimal(path, "again"))
    assert check(folder, every_hash=True)["added"] == ["more.json"] and (folder / "mine" / "notes").exists()
    assert (folder / "elsewhere").is_symlink()
    (folder / "more.json").write_text("{")
    with pytest.raises(Damaged, match=r"more\.json: has 1 bytes, .*; delete it, and let the job that made it"):
        stands()
    (folder / "more.json").unlink()
    assert not stands()
    run_folder.write(folder, folder.parent, ["a-1"], "", lambda path: minimal(path, "again"))
    assert stands()
    run_folder.add(folder, lambda path: write_json(path / "more.json", {"a": 1}), ["more.json"])
    run_folder.write(folder, folder.parent, ["a-2"], "", lambda path: minimal(path, "of another"))
    assert not (folder / "more.json").exists() and (folder / "mine" / "notes").exists()
    assert "more.json: of other stages, left out of" in capsys.readouterr().out


def test_names_in_files_lead_nowhere_else(folder, tmp_path):
    (tmp_path / "x").mkdir()
    write_json(tmp_path / "x" / "manifest.json", {"private": 1})
    write_sealed(folder / SEAL, {**read_sealed(folder / SEAL), "stages": ["../../x"]})
    bundle = cli.bundle
    with pytest.raises(UserError, match=r"directory: '\.\./\.\./x' is not the name of a folder"):
        bundle([str(folder), "--to", str(tmp_path / "run.tar.gz")])
    assert not (tmp_path / "run.tar.gz").exists()
    write_json(folder / "ledger.json", {"stages": [{"stage": "a", "directory": "../../x"}]})
    reseal(folder)
    with pytest.raises(UserError, match="is not the name of a folder"):
        Run.open(folder).stage("a")
    for name in ("..", "../../x", "/abs", "none"):
        with pytest.raises(UserError, match="has no SAE"):
            Run.open(folder).sae(name)


def test_a_report_is_written_into_its_run_only(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    minimal(folder, "a run")
    (folder / "saes").mkdir(exist_ok=True)
    (folder / "saes" / "one").symlink_to(elsewhere)
    for part, status in (("saes/one", "completed"), ("figures", "error")):
        table = pd.read_parquet(folder / "table.parquet").assign(status=status, l0=4.0, fvu=0.1)
        table.to_parquet(folder / "table.parquet")
        with pytest.raises(UserError, match=rf"{part}: leads out of .*mine; remove the link"):
            write_report(folder)
        (folder / "saes" / "one").unlink(missing_ok=True)
        if not (folder / "figures").is_symlink():
            for file in (folder / "figures").iterdir():
                file.unlink()
            (folder / "figures").rmdir()
            (folder / "figures").symlink_to(elsewhere)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["table.parquet", "decision.json", "ledger.json", "config.yaml", "curves.parquet"])
def test_a_report_of_damaged_files_names_them(folder, name):
    for content in (b"", b"[]", b"3", b"\xff\xfe\x00", b"{"):
        (folder / name).write_bytes(content)
        if name == "config.yaml" and content == b"":
            continue  # an empty config
        with names(folder / name):
            write_report(folder)
