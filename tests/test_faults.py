"""Whatever is killed in mid-run, the rerun ends with the same rows and, on a CPU with a grid, the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from glob import glob
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pandas as pd
import pytest
from small import sae_hashes, small_job, small_values, stage_of, timeless, write_config

import raysae
from raysae.activations import capture
from raysae.activations.store import Store
from raysae.errors import CaptureError
from raysae.on_ray import tune
from raysae.studies.sweep import SweepStudy, bench_of
from raysae.sweep import trial as trials
from raysae.sweep.trial import Trial
from raysae.workspace import Made

ROOT = Path(__file__).resolve().parents[1]
LONGER = {"tokens": 80_000, "rungs": 8}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, arithmetic_model, tmp_path_factory) -> raysae.Run:
    return raysae.run_sweep(small_job(arithmetic_model, tmp_path_factory.mktemp("undisturbed"), training=LONGER))


def rows_of(output: Path) -> dict[str, int]:
    store = Store(stage_of(output, "store"))
    store.verify()
    return {shard.name: shard.rows for shard in store.shards}


def wait_for(what: Callable[[], object], seconds: float = 120) -> object:
    """The first true value of `what()`; fails after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("what was waited for did not happen")


def sweep_while_killing(find_pid: Callable[[], int | None], model: Path, output: Path) -> raysae.Run:
    """The run of `undisturbed` while the process that `find_pid` finds is killed, once; fails where none was."""
    killed: list[int] = []

    def kill() -> None:
        pid = wait_for(find_pid)
        assert isinstance(pid, int) and pid != os.getpid()
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run = raysae.run_sweep(small_job(model, output, training=LONGER))
    thread.join()
    assert killed
    return run


def dying_once(note: Path) -> Callable[..., None]:
    """A trainable whose process is killed, once in a sweep, as soon as the state of a third rung is kept."""

    def trainable(config: dict, trial: Trial, **given: object) -> None:
        keep, kept = trials.keep_state, []

        def keep_and_die(folder: Path, rung: object) -> None:
            keep(folder, rung)
            kept.append(folder)
            if len(kept) == 3:
                with suppress(FileExistsError), note.open("x") as file:
                    file.write(folder.name)
                    file.flush()
                    os.kill(os.getpid(), SIGKILL)

        trials.keep_state = keep_and_die
        try:
            tune.run_trial(config, trial, **given)  # a worker's own, which is not patched
        finally:
            trials.keep_state = keep

    return trainable


def same(run: raysae.Run, undisturbed: raysae.Run) -> None:
    assert rows_of(run.path.parent) == rows_of(undisturbed.path.parent)
    assert sae_hashes(run.path) == sae_hashes(undisturbed.path)
    timed = ["train_seconds"]
    pd.testing.assert_frame_equal(
        run.table.drop(columns=timed), undisturbed.table.drop(columns=timed), check_exact=True
    )
    pd.testing.assert_frame_equal(run.curves, undisturbed.curves, check_exact=True)
    assert timeless(run.decision) == timeless(undisturbed.decision)


def test_a_killed_capture_actor(ray_cluster, undisturbed, arithmetic_model, tmp_path):
    def actor() -> int | None:  # at work on a block, when one shard is done already
        if not list(tmp_path.glob("stages/store-*/shards/*.json")):
            return None
        for file in tmp_path.glob("stages/store-*/attempts/train-*"):
            try:
                return int(file.read_text().split()[-1])
            except (OSError, IndexError):
                continue
        return None

    same(sweep_while_killing(actor, arithmetic_model, tmp_path), undisturbed)


def test_a_killed_trial(ray_cluster, undisturbed, arithmetic_model, tmp_path, monkeypatch):
    """With five of its eight rungs to go. The moment is the trial's own: it lasts a fraction of a second."""
    note = tmp_path / "killed"
    monkeypatch.setattr(tune, "run_trial", dying_once(note))
    run = raysae.run_sweep(small_job(arithmetic_model, tmp_path / "results", training=LONGER))
    assert note.read_text()
    same(run, undisturbed)


# ----------------------------------------------------------------------------------------------------------------------
# Signals

MOMENTS = {
    "the records are made": (SIGKILL, "there", "stages/records-*"),
    "the tokens are named as made": (SIGTERM, "renamed", "stages/tokens-*/manifest.json"),
    "a host begins with a block": (SIGINT, "there", "stages/store-*/attempts/train-*"),
    "a shard is there": (SIGKILL, "there", "stages/store-*/shards/*.json"),
    "the store is named as made": (SIGKILL, "renamed", "stages/store-*/manifest.json"),
    "Tune has its tuner and no experiment": (SIGKILL, "there", "stages/sweep-*/tune/tuner.pkl"),
    "no SAE is done": (SIGINT, "there", "stages/sweep-*/state/*/0*"),
    "SAEs train": (SIGTERM, "there", "stages/sweep-*/state/*/0*"),
    "half of Tune's files are written": (SIGKILL, "there", "stages/sweep-*/state/*/0*"),
    "an SAE is done": (SIGINT, "there", "stages/sweep-*/saes/*"),
    "the sweep is named as made": (SIGKILL, "renamed", "stages/sweep-*/manifest.json"),
    "a block is measured": (SIGTERM, "there", "stages/measurement-*/*/*.json"),
    "the ledger is written": (SIGINT, "renamed", "*/ledger.json"),
    "the decision is written": (SIGKILL, "renamed", "*/decision.json"),
    "the run gets its name": (SIGKILL, "renamed", "model*-arithmetic-*"),
}
"""In the order of a run, each: a signal, and at which file. One folder of results goes through all of them."""
OF_ITS_OWN = ("an SAE is done", "a block is measured")
"""Moments of a job that was started as a user starts it, with a Ray cluster of its own; a terminal signals its group."""
SAID = "interrupted; the same command goes on from here"


@pytest.fixture(scope="module")
def forked(ray_cluster) -> Iterator[subprocess.Popen]:
    """A process that forks jobs, which join the session's cluster: see `forked_jobs.py`."""
    import ray

    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_jobs.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    yield server
    assert server.stdin is not None
    server.stdin.close()
    server.wait(timeout=60)


def fork_job(server: subprocess.Popen, config: Path, log: Path, trap: tuple[int, str, str]) -> int:
    """The exit status of a job that gets its trap's signal; negative where the signal ended it."""
    print(json.dumps({"config": str(config), "log": str(log), "trap": trap}), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())["status"]


def command_signalled(config: Path, log: Path, number: int, sign: str) -> int:
    """The exit status of the command itself, whose process group gets the signal; nothing that it started lives on."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    before = set(glob(sign))
    with log.open("a") as file:
        job = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "sweep_sae.py"), "--config", str(config)],
            stdout=file, stderr=file, start_new_session=True, env=env,
        )  # fmt: skip
    wait_for(lambda: set(glob(sign)) - before or job.poll() is not None, seconds=400)
    os.killpg(job.pid, number)
    status = job.wait(timeout=200)

    def left() -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.getsid(int(process.name)) == job.pid:
                    found.append(int(process.name))
        return found

    wait_for(lambda: not left())
    return status


def halve(*files: Path) -> None:
    for file in files:
        with suppress(FileNotFoundError):  # a trial outlives its killed driver by a moment
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])


def damage(moment: str, sweep: Path) -> None:
    """Leave half of what a kill at this moment, or a power cut, may leave half."""
    if moment == "half of Tune's files are written":  # and of the packs' state, and of lines of history
        halve(*(file for file in (sweep / "tune").glob("*.*") if file.is_file()))
        halve(*sweep.glob("state/*/*/*"), *sweep.glob("history/*.jsonl"))
    if moment == "an SAE is done":
        halve(next(sweep.glob("saes/*/sae_weights.safetensors")))


@pytest.mark.timeout(1800)
def test_a_run_goes_on_from_every_moment_to_the_same_bits(ray_cluster, forked, undisturbed, arithmetic_model, tmp_path):
    output = tmp_path / "results"
    config = write_config(tmp_path / "job.yaml", small_values(arithmetic_model, output, training=LONGER))
    for i, (moment, (number, when, pattern)) in enumerate(MOMENTS.items()):
        log, sign = tmp_path / f"{i}.log", f"{output}/{pattern}"
        if moment in OF_ITS_OWN:
            status = command_signalled(config, log, number, sign)
        else:
            status = fork_job(forked, config, log, (number, when, sign))
        said = f"{moment}: {log.read_text()}"
        assert status == (-number if number == SIGKILL else 128 + number), said
        if number != SIGKILL:
            assert said.splitlines()[-1] == SAID and "Traceback" not in said and "SIGABRT" not in said, said
        assert not list(output.glob("[!.]*/decision.json")), said
        if moment == "Tune has its tuner and no experiment":
            assert not list(output.glob("stages/sweep-*/tune/experiment_state*"))
        for sweep in output.glob("stages/sweep-*"):
            damage(moment, sweep)
    run = raysae.run_sweep(small_job(arithmetic_model, output, training=LONGER))
    same(run, undisturbed)
    assert run.path.name == undisturbed.path.name
    assert not list(run.path.parent.glob("stages/sweep-*/state/*/*"))


def test_an_sae_that_failed_for_good_is_tried_again_by_the_next_run(
    ray_cluster, undisturbed, arithmetic_model, tmp_path
):
    shutil.copytree(undisturbed.path.parent / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns(".locks"))
    folder, failing = stage_of(tmp_path, "sweep"), "003-topk-x4-k4-s0"
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "saes" / failing)
    (folder / "state").write_text("where its state would go")
    config = small_job(arithmetic_model, tmp_path, training=LONGER, cluster={"max_restarts": 0})

    def swept() -> tuple[Made, set[str], str]:
        with bench_of(config) as bench:
            again = SweepStudy(config, bench)
            made = again.workspace.make(again.saes)
        table = pd.read_parquet(made.path / "table.parquet").set_index("sae_id")["status"]
        return made, set(table[table == "completed"].index), table[failing]

    done = {sae_id for sae_id in undisturbed.saes if sae_id != failing}
    for _ in range(2):  # it is tried by every run, once each
        made, completed, status = swept()
        assert completed == done and status == "error" and not made.reused
        assert list(made.manifest["failed"]) == [failing] and made.key != made.path.name
    (folder / "state").unlink()
    made, completed, status = swept()
    assert completed == done | {failing} and not made.manifest["failed"] and made.key == made.path.name
    assert swept()[0].reused
    assert sae_hashes(made.path) == sae_hashes(undisturbed.path)


# ----------------------------------------------------------------------------------------------------------------------
# Nodes and blocks


@pytest.mark.timeout(900)
def test_a_lost_node(undisturbed, arithmetic_model, tmp_path):
    """A node of a simulated cluster goes in the capture, another in the sweep."""
    script = Path(__file__).with_name("lose_nodes.py")
    config = small_values(arithmetic_model, tmp_path / "results", training=LONGER)
    config["cluster"] = {"capture_actors": 2, "max_restarts": 4}
    done = subprocess.run(
        [sys.executable, str(script), str(write_config(tmp_path / "job.yaml", config))],
        capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("removed a node") == 2
    (directory,) = {file.parent for file in (tmp_path / "results").glob("*/decision.json")}
    same(raysae.Run.open(directory), undisturbed)


def test_a_block_that_always_kills_its_host_fails_with_its_name(ray_cluster, arithmetic_model, tmp_path, monkeypatch):
    real = capture.Capture

    class Deadly(real):
        def __call__(self, host, block):
            if block.name.startswith("train-00001"):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(host, block)

    monkeypatch.setattr(capture, "Capture", Deadly)
    with pytest.raises(CaptureError, match=r"train-00001-\w+ killed its host 2 times"):
        raysae.run_sweep(small_job(arithmetic_model, tmp_path, cluster={"max_restarts": 1}))
    assert not list(tmp_path.glob("stages/store-*/manifest.json"))
    monkeypatch.setattr(capture, "Capture", real)
    assert rows_of(raysae.run_sweep(small_job(arithmetic_model, tmp_path)).path.parent)
