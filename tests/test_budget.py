"""What a run spent against its budget, and which runs are refused before they start."""

import pytest
from small import small_job, small_values, study

import raysae
from raysae.config.load import validate
from raysae.errors import UserError
from raysae.plan.budget import refuse_overspending, spending

NOTHING = {"device_hours": None, "tokens": None, "gigabytes": None}


def stage(name="sweep", reused=False, **cost):
    return {"stage": name, "reused": reused, "cpu_seconds": 0, "gpu_seconds": 0, "tokens": 0, "bytes": 0, **cost}


def test_spending_counts_reused_stages_and_states_them_apart():
    stages = [
        stage("store", reused=True, cpu_seconds=1800, tokens=1000, bytes=3e9),
        stage("sweep", cpu_seconds=5400, tokens=9000, bytes=1e9),
    ]
    found = spending(stages, {"device_hours": 4, "tokens": 8000, "gigabytes": None})
    assert found["device"] == "CPU"
    assert found["device_hours"] == {"spent": 2.0, "before": 0.5, "limit": 4, "share": 0.5}
    assert found["tokens"] == {"spent": 10_000, "before": 1000, "limit": 8000, "share": 1.25}
    assert found["gigabytes"] == {"spent": 4.0, "before": 3.0, "limit": None, "share": None, "activations": 3.0}


def test_device_hours_are_gpu_hours_where_any_stage_held_a_gpu():
    stages = [stage("model", cpu_seconds=7200), stage("sweep", cpu_seconds=7200, gpu_seconds=3600)]
    found = spending(stages, NOTHING)
    assert found["device"] == "GPU" and found["device_hours"]["spent"] == 1.0


def test_only_more_than_the_limit_is_refused():
    refuse_overspending({"tokens": 100, "gigabytes": 2.0}, {"tokens": 100, "gigabytes": None}, "3 SAEs")
    with pytest.raises(UserError) as caught:
        refuse_overspending({"tokens": 101}, {"tokens": 100}, "3 SAEs")
    message = str(caught.value)
    assert message.startswith("budget.tokens: 3 SAEs take 101, the budget is 100; ") and "\n" not in message


@pytest.mark.parametrize("name,limit,what", [
    ("tokens", 100_000, "4 SAEs take 159,744"),  # known from the config alone
    ("gigabytes", 1e-5, "4 SAEs take"),
    ("tokens", 200_000, "4 SAEs and the activations of"),  # known once the tokens are counted
    ("gigabytes", 0.002, "4 SAEs and the activations of"),
])  # fmt: skip
def test_a_run_that_must_overspend_does_not_start(arithmetic_model, tmp_path, name, limit, what):
    values = small_values(arithmetic_model, tmp_path, budget={name: limit})
    small = study(validate(raysae.SweepJob, values))
    with pytest.raises(UserError, match=rf"budget\.{name}: {what}"):
        small.prepare()
    begun = {path.name.split("-")[0] for path in tmp_path.glob("stages/*") if path.name != ".locks"}
    assert begun == (set() if what == "4 SAEs take 159,744" or limit == 1e-5 else {"records", "tokens"})
    assert not small.directory.exists()


def test_the_check_counts_what_the_ledger_will(arithmetic_model, tmp_path):
    """A budget of exactly what the records, captured rows and SAEs come to is enough; one token less is not."""
    probe = study(small_job(arithmetic_model, tmp_path))
    rows = probe.workspace.make(probe.tokens).manifest["rows"]
    exactly = 4 * (40_000 // 512) * 512 + 2 * sum(rows.values()) + rows["validation"]
    study(small_job(arithmetic_model, tmp_path, budget={"tokens": exactly})).prepare()
    with pytest.raises(UserError, match=r"budget\.tokens"):
        study(small_job(arithmetic_model, tmp_path, budget={"tokens": exactly - 1})).prepare()


def test_a_budget_is_no_part_of_what_results_depend_on(arithmetic_model, tmp_path):
    one, two = (
        study(small_job(arithmetic_model, tmp_path, **changes)) for changes in ({}, {"budget": {"tokens": 10**9}})
    )
    assert one.directory == two.directory and one.identity() == two.identity()
