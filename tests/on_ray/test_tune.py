"""What Tune is handed of a sweep, without a cluster: its loggers, its table, and none of the secrets."""

import os
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from outside import foreign

from raysae.on_ray import tune
from raysae.sweep.prune import Pruning
from raysae.sweep.search import PackSearch
from raysae.sweep.space import Common, proposals

SITE = "blocks.0.resid_post"


def search(pack_size: int = 1) -> PackSearch:
    plan = proposals({SITE: 16}, ["relu", "topk"], [2, 4], {"relu": [0.1, 0.2, 0.3], "topk": [2, 3, 4]}, 0)
    return PackSearch(plan, {SITE: 16}, {}, [0], Common(None, 1e-3), pack_size, seed=0)


def config_of(searcher: PackSearch) -> dict:
    """Of its first trial."""
    return tune.ProposedPacks(searcher).suggest("a")


def test_a_pack_that_did_not_fit_is_reported_and_comes_again_in_halves(monkeypatch, tmp_path):
    reported = []
    monkeypatch.setattr(tune, "train_proposed", lambda *_: False)
    monkeypatch.setattr(tune.tune, "report", reported.append)
    searcher = tune.ProposedPacks(search(pack_size=12))
    config = searcher.suggest("a")
    assert searcher.suggest("b") is None, "it may yet come back"
    tune.run_trial(config, SimpleNamespace(root=tmp_path), torch.get_num_threads(), Pruning())
    assert reported == [{"out_of_memory": True, "final": True}]
    searcher.on_trial_complete("a", reported[0])
    halves = [searcher.suggest(name) for name in "bc"]
    assert [m for half in halves for m in half["members"]] == config["members"]
    for name, half in zip("bc", halves, strict=True):
        rung = {m["sae_id"]: {"sae_id": m["sae_id"], "fvu": 0.5, "l0": 2.0} for m in half["members"]}
        searcher.on_trial_complete(name, {"members": rung, "final": True})
    assert searcher.suggest("d") == searcher.FINISHED


def test_a_trial_is_stopped_when_all_of_its_pack_is_pruned(tmp_path):
    scheduler = tune.StopPruned(tmp_path, Pruning(0.1, 1000))
    trial = SimpleNamespace(config={"site": SITE})

    def decide(sae_id, fvu, tokens=1000, **of_tune):
        facts = {"sae_id": sae_id, "architecture": "relu", "d_sae": 32, "tokens": tokens, "fvu": fvu, "l0": 10 * fvu}
        return scheduler.on_trial_result(None, trial, facts | of_tune)

    assert [decide("good", 0.1), decide("early", 0.9, 500), decide("bad", 0.9, final=True)] == ["CONTINUE"] * 3
    assert decide("bad", 0.9) == "STOP"
    assert "dominated by good" in (tmp_path / "pruned" / "bad.json").read_text()


class Pack:
    """What Tune's loggers and table know of a trial."""

    trial_id, status, error_file = "ab12_00003", "RUNNING", None
    last_result: ClassVar[dict] = {}

    def __init__(self, config, path):
        self.config, self.local_path = config, str(path)


def rung(config, tokens, drop=()):
    found = {}
    for i, member in enumerate(config["members"]):
        if i not in drop:
            found[member["sae_id"]] = {
                "sae_id": member["sae_id"],
                "tokens": tokens,
                "fvu": 0.5 / (i + 1),
                "l0": 4.0 + i,
            }
    flat = next(iter(found.values())) if len(config["members"]) == 1 else {"members": found}
    return {**flat, "final": False, "timesteps_total": tokens, "training_iteration": 1, "config": config}


@pytest.mark.parametrize("size", [1, 3])
def test_each_sae_of_a_pack_is_a_run_of_its_own_in_tensorboard(size, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(search(size))
    pack, logger = Pack(config, tmp_path), tune.TensorBoard()
    logger.on_trial_start(0, [pack], pack)
    logger.on_trial_result(0, [pack], pack, rung(config, 1000))
    logger.on_trial_result(1, [pack], pack, rung(config, 2000, drop=[1]))
    logger.on_trial_complete(1, [pack], pack)
    for i, member in enumerate(config["members"]):
        run = EventAccumulator(str(tmp_path if size == 1 else tmp_path / member["sae_id"])).Reload()
        events = [(e.step, e.value) for e in run.Scalars("ray/tune/fvu")]
        assert events == [(t, pytest.approx(0.5 / (i + 1))) for t in ((1000,) if i == 1 else (1000, 2000))]
        assert not any(member["sae_id"] in tag or "members" in tag for tag in run.Tags()["scalars"])
        hparams = run.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        assert b"expansion_factor" in hparams and member["config"]["architecture"].encode() in hparams
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == size


def test_the_table_has_a_row_for_each_sae_of_a_pack_that_it_dropped_too(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(tune, "say", said.append)
    config = config_of(search(3))
    pack = Pack(config, tmp_path)
    pack.local_experiment_path, pack.temporary_state = str(tmp_path), SimpleNamespace(location="here")
    for result in (rung(config, 1000), rung(config, 2000, drop=[0])):
        pack.last_result = result
        tune.SweepProgress().on_trial_result(0, [pack], pack, result)
    table = tune.Table()
    table.set_start_time(0.0)
    table.report([pack], False)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said[0].splitlines() if "| RUNNING " in line]
    assert [row[0][-12:] for row in rows] == [m["sae_id"][-12:] for m in config["members"]]
    assert [row[-3:-1] for row in rows] == [["1000", "0.5"], ["2000", "0.25"], ["2000", "0.166667"]]
    assert [row[3] for row in rows] == [f"{m['config']['d_sae'] / 16:g}" for m in config["members"]]


def test_no_secret_goes_through_rays_log_to_a_trial(monkeypatch, tmp_path):
    from ray.tune.execution.class_cache import _ActorClassCache

    handed = []

    class Tuner:
        def __init__(self, *_, **__):
            pass

        def fit(self):
            handed.append(_ActorClassCache().get(type("T", (), {}))._default_options["runtime_env"]["env_vars"])
            return []

    monkeypatch.setattr(tune, "Tuner", Tuner)
    monkeypatch.setattr(tune.tune, "with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "SECRET")
    trial = SimpleNamespace(root=tmp_path, tokens=1)
    tune.run_sweep(search(), trial, Pruning(), tune.Placement(1, 1.0, 0.0, 1), 0)
    assert handed and "SECRET" not in handed[0].values()


@pytest.mark.parametrize("ours", [True, False])
def test_the_key_of_weights_and_biases_is_handed_on_only_to_another_cluster(ours, monkeypatch, tmp_path):
    wandb = foreign("ray.air.integrations.wandb")
    seen = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(tune.ray._private.worker, "_global_node", SimpleNamespace(is_head=lambda: ours))
    start = lambda self, *_, **__: seen.append("WANDB_API_KEY" in os.environ)  # noqa: E731
    monkeypatch.setattr(wandb.WandbLoggerCallback, "_start_logging_actor", start)
    tune._wandb("project", tmp_path)._start_logging_actor(None, [])
    assert seen == [not ours] and os.environ["WANDB_API_KEY"] == "k" * 40
