"""The schedule's arithmetic: what is exact is exact, and workers, packs and widths count as they should."""

from dataclasses import replace

import pytest

from raysae.config.jobs import SweepJob
from raysae.config.load import validate
from raysae.placement import Placement
from raysae.plan.budget import spending
from raysae.plan.schedule import (
    TUNE_BYTES,
    Entry,
    Kind,
    Rates,
    SAERates,
    Work,
    activation_bytes,
    between,
    capture_entry,
    evaluation_entry,
    in_words,
    makespan,
    sae_bytes,
    sweep_entry,
)
from raysae.studies.plan import Plan, left_out

NARROW, WIDE = Kind(8, "topk", 16), Kind(8, "topk", 64)
ONE = SAERates(step=0.01, rung=0.5, start=1.0, rows=1e-5, size=1000)
RATES = Rates(
    saes={NARROW: ONE, WIDE: replace(ONE, step=0.04, size=4000)}, ray_start=5.0, host_start=10.0, trial_start=3.0,
    capture=1e-3, columns=4.0, score_clean=1e-3, score_sae=2e-4, intervals=1e-3,
)  # fmt: skip
WORK = Work(
    rows={"train": 4000, "validation": 1000, "test": 1000},
    blocks={"train": [2000, 2000], "validation": [1000], "test": [1000]},
    groups={"train": 40, "validation": 10, "test": 10},
    widths={"blocks.0.resid_post": 8},
    dtype="bfloat16",
    points=[("blocks.0.resid_post", NARROW)] * 4,
    steps=100,
    batch_size=50,
    rungs=4,
    pack_size=1,
    max_scored=500,
)
CPUS, GPUS = Placement(2, 1.0, 0.0, 1), Placement(2, 4.0, 1.0, 4)


def test_jobs_go_to_the_first_worker_that_is_free():
    assert makespan([4, 1, 1, 1], 2) == 4
    assert makespan([1, 1, 1, 4], 2) == 5  # the long one last leaves a worker idle
    assert makespan([2, 2, 2], 1) == 6 and makespan([], 3) == 0


def test_a_kind_in_between_is_linear_in_its_width():
    found = between(RATES.saes, Kind(8, "topk", 40))
    assert found.step == pytest.approx(0.025) and found.size == pytest.approx(2500) and found.rung == 0.5
    assert between(RATES.saes, WIDE) is RATES.saes[WIDE]


def test_capture_holds_its_devices_while_hosts_start():
    entry = capture_entry(WORK, RATES, replace(CPUS, cpus=0.5))
    assert entry.seconds == pytest.approx(10 + 3)  # six seconds of rows in blocks of 2, 2, 1 and 1, on two hosts
    assert entry.cpu_seconds == pytest.approx(entry.seconds * 2 * 0.5) and entry.gpu_seconds == 0
    assert entry.tokens == 6000
    assert entry.bytes == activation_bytes(6000, [8], "bfloat16") + 4 * 6000 == 6000 * 8 * 2 + 24_000


def test_the_sweep_counts_every_step_rung_and_start():
    entry = sweep_entry(WORK, RATES, CPUS)
    trial = 1.0 + 100 * 0.01 + 4 * 0.5
    assert entry.seconds == pytest.approx(3 + 2 * trial) and entry.workers == 2
    assert entry.cpu_seconds == pytest.approx(4 * 100 * 0.01)  # as the ledger: training steps, not what lies between
    assert entry.tokens == 4 * 100 * 50 and entry.bytes == 4 * (1000 + TUNE_BYTES)


def test_packs_share_a_start_and_sites_share_no_pack():
    packed = sweep_entry(replace(WORK, pack_size=4), RATES, GPUS)
    assert packed.seconds == pytest.approx(3 + 1 + 4 * (100 * 0.01 + 4 * 0.5)) and packed.workers == 1
    assert packed.gpu_seconds == pytest.approx(4.0) and packed.cpu_seconds == pytest.approx(16.0)
    points = [("a", NARROW), ("a", NARROW), ("b", NARROW), ("b", NARROW)]
    assert sweep_entry(replace(WORK, pack_size=4, points=points), RATES, GPUS).workers == 2


def test_evaluation_scores_no_more_than_it_is_told_to():
    points = [("blocks.0.resid_post", NARROW)] * 3
    entry = evaluation_entry(WORK, RATES, Placement(1, 0.5, 0.0, 2), "validation", points)
    assert entry.seconds == pytest.approx(10 + 1000 * 3e-5 + 500 * (1e-3 + 3 * 2e-4) + 3 * 10 * 1e-3)
    assert entry.tokens == 1000 and entry.stage == "evaluation (validation)"


def test_sizes_of_saes():
    assert sae_bytes(64, 256) == 4 * (64 * 256 + 256 * 64 + 256 + 64)


def test_the_table_tells_what_is_done_from_what_is_to_do_and_what_goes_over():
    done = Entry("tokens", 2.0, 1, 0, 0, 0, 0, 500, 10**6, done=True)
    ahead = Entry("sweep", 7200.0, 2, 1.0, 0.0, 7200.0, 0.0, 1500, 2 * 10**9)
    entries = [done, ahead]
    spent = spending([e.ledger() for e in entries], {"device_hours": 1.0, "tokens": 4000, "gigabytes": None})
    assert spent["tokens"]["before"] == 500 and spent["tokens"]["spent"] == 2000
    lines = in_words(entries, spent).splitlines()
    assert "done" in lines[1] and "2.0 h" in lines[2] and "2 x 1 CPU" in lines[2]
    assert lines[3].split()[:4] == ["to", "do", "2.0", "h"] and "1,500" in lines[3] and "2,000" not in lines[3]
    assert any(line.startswith("budget.device_hours: 2 of 1 (200%) OVER") for line in lines)
    assert any(line.startswith("budget.tokens: 2,000 of 4,000 (50%)") and "OVER" not in line for line in lines)
    assert not any("budget.gigabytes" in line for line in lines)


def test_a_plan_names_what_it_does_not_project():
    asked = {
        "sweep": {"seeds": [0, 1]}, "evaluation": {"nulls": ["pca", "untrained"], "features": "none", "invariance": 5},
        "probes": {"labels": ["step"]},
    }  # fmt: skip
    assert left_out(SweepJob()) == ("features",)
    assert left_out(validate(SweepJob, asked)) == ("nulls (pca)", "stability", "probes", "invariance")
    nothing = spending([], {"device_hours": None, "tokens": None, "gigabytes": None})
    plan = Plan((), nothing, None, ("nulls (pca)", "stability"))
    assert str(plan).endswith("not projected: nulls (pca), stability")
