"""The Tune searcher without a cluster: what it hands out, what it tells Optuna, and how one that is begun anew goes on."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from raysae.files import write_json
from raysae.on_ray import tune as on_ray
from raysae.on_ray.tune import PackSearch
from raysae.sweep.space import Common, proposals

WIDTHS = {"blocks.0.resid_post": 16, "blocks.1.resid_post": 16}
RANGES = {"relu": (0.01, 1.0), "topk": (2, 12)}


def search(pack_size: int = 1, seeds=(0,), samples: int = 3, sites=("blocks.0.resid_post",), **known) -> PackSearch:
    widths = {site: WIDTHS[site] for site in sites}
    plan = proposals(widths, ["relu", "topk"], [2, 4], None, samples)
    return PackSearch(plan, widths, RANGES, seeds, Common(None, 1e-3), pack_size, seed=0, **known)


def outcome(config: dict) -> dict:
    """A made-up result: less L1 or more k is a lower FVU and a higher L0."""
    metrics = {}
    for member in config["members"]:
        c = member["config"]
        l0 = float(c["k"] or 1 / c["l1_coefficient"])
        metrics[member["sae_id"]] = {"fvu": 1 / (1 + l0), "l0": l0}
    return {"members": metrics}


def drain(searcher: PackSearch, name: str = "t") -> list[dict]:
    """Every pack, each finished before the next is asked for."""
    packs = []
    while isinstance(config := searcher.suggest(f"{name}{len(packs)}"), dict):
        packs.append(config)
        searcher.on_trial_complete(f"{name}{len(packs) - 1}", outcome(config))
    return packs


def members(packs: list[dict]) -> list[dict]:
    return [member for pack in packs for member in pack["members"]]


def test_each_width_and_architecture_comes_equally_often():
    found = members(drain(search()))
    count = {(m["config"]["architecture"], m["config"]["d_sae"]): 0 for m in found}
    for m in found:
        count[m["config"]["architecture"], m["config"]["d_sae"]] += 1
    assert count == {("relu", 32): 3, ("relu", 64): 3, ("topk", 32): 3, ("topk", 64): 3}


def test_no_sae_is_proposed_twice_though_k_is_an_integer():
    found = [(m["config"]["d_sae"], m["config"]["k"]) for m in members(drain(search(samples=8))) if m["config"]["k"]]
    assert len(set(found)) == len(found) == 16


def test_a_range_ends_where_the_latents_do():
    plan = proposals({"s": 16}, ["topk"], [0.5, 4], None, 7)
    searcher = PackSearch(plan, {"s": 16}, {"topk": (2, 32)}, (0,), Common(), 1, seed=0)
    found = [m["config"] for m in members(drain(searcher))]
    narrow = sorted(c["k"] for c in found if c["d_sae"] == 8)
    assert narrow == [2, 3, 4, 5, 6, 7, 8]  # each once, where 9 to 32 would all be k = 8
    assert max(c["k"] for c in found if c["d_sae"] == 64) > 8


def test_seeds_share_their_coefficient_and_are_told_as_one():
    searcher = search(seeds=(0, 1, 2))
    found = members(drain(searcher))
    by_proposal: dict[str, set] = {}
    for m in found:
        c = m["config"]
        by_proposal.setdefault(m["sae_id"].split("-")[0], set()).add((c["l1_coefficient"], c["k"]))
    assert len(found) == 3 * 12 and all(len(coefficients) == 1 for coefficients in by_proposal.values())
    told = [t for study in searcher.studies.values() for t in study.trials if t.state.is_finished() and t.values]
    assert len(told) == 12 and not searcher.open


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_packs_hold_every_sae_once_and_one_site_each(size):
    searcher = search(pack_size=size, seeds=(0, 1), sites=WIDTHS)
    packs = drain(searcher)
    ids = [m["sae_id"] for m in members(packs)]
    assert len(packs) <= searcher.most_trials and len(set(ids)) == len(ids) == 48
    assert len(packs) == 2 * -(-24 // size)
    assert all(len(pack["members"]) <= size for pack in packs)


def test_a_member_that_its_pack_dropped_is_told_by_its_last_rung():
    searcher = search(pack_size=2)
    config = searcher.suggest("a")
    whole = outcome(config)
    searcher.on_trial_result("a", whole)
    dropped = config["members"][0]["sae_id"]
    searcher.on_trial_complete("a", {"members": {i: m for i, m in whole["members"].items() if i != dropped}})
    told = [t.values for study in searcher.studies.values() for t in study.trials if t.values]
    assert sorted(told) == sorted([m["fvu"], m["l0"]] for m in whole["members"].values())


def test_optuna_hears_of_failures_and_goes_on():
    searcher = search(samples=2)
    config = searcher.suggest("a")
    searcher.on_trial_complete("a", None, error=True)
    assert isinstance(config, dict) and not searcher.open
    (failed,) = [t for study in searcher.studies.values() for t in study.trials if t.state.name == "FAIL"]
    assert failed.params
    assert len(drain(searcher)) == 7


def ended_of(packs: list[dict]) -> dict[str, dict]:
    return {sae_id: rung for pack in packs for sae_id, rung in outcome(pack)["members"].items()}


def test_a_search_begun_anew_over_the_same_folder_goes_on_the_same(tmp_path: Path):
    whole = drain(search(root=tmp_path / "whole"))
    first = search(root=tmp_path)
    begun = [first.suggest(f"t{i}") for i in range(5)]  # one ended in another order, the fifth is running: then a kill
    ended = ended_of(begun[:4])
    again = search(root=tmp_path, ended=ended)
    assert not again.nothing_left
    rest = drain(again, "again")
    assert copy.deepcopy(begun[:4]) + rest == whole and rest[0] == begun[4]
    told = [t.values for study in again.studies.values() for t in study.trials if t.values]
    assert len(told) == 12 and not again.open, "Optuna did not hear of those that had ended"
    assert search(root=tmp_path, ended=ended | ended_of(rest)).nothing_left


def test_what_was_proposed_before_is_proposed_again_whatever_optuna_thinks_now(tmp_path: Path):
    ids = [m["sae_id"] for m in members(drain(search(root=tmp_path)))]
    (file, *others) = sorted((tmp_path / "proposed").iterdir())
    write_json(file, {"coefficient": 0.123456789012345})
    others[0].write_text('{"coeff')  # a power cut: chosen anew
    found = members(drain(search(root=tmp_path)))
    assert found[0]["config"]["l1_coefficient"] == 0.123456789012345
    assert len(found) == 12 and [m["sae_id"] for m in found][2:] == ids[2:]


def test_a_search_whose_proposals_are_not_all_made_has_something_left(tmp_path: Path):
    assert not search(root=tmp_path).nothing_left and not search().nothing_left


@pytest.mark.parametrize("size", [2, 5])
def test_packs_are_the_same_when_some_of_their_members_have_ended(tmp_path: Path, size):
    whole = drain(search(size, seeds=(0, 1), root=tmp_path))
    ended = ended_of(whole[:1]) | {whole[1]["members"][0]["sae_id"]: {"fvu": 0.5, "l0": 3.0}}
    rest = drain(search(size, seeds=(0, 1), root=tmp_path, ended=ended))
    assert [pack["state"] for pack in rest] == [pack["state"] for pack in whole[1:]], "their state would not be found"
    assert rest[0]["members"] == whole[1]["members"][1:] and rest[1:] == whole[2:]


def test_a_pack_that_did_not_fit_comes_again_in_halves_and_nothing_is_lost():
    searcher = search(pack_size=6, seeds=(0, 1))
    first = searcher.suggest("a")
    searcher.on_trial_complete("a", {"out_of_memory": True, "final": True})
    rest = drain(searcher)
    assert {len(pack["members"]) for pack in rest} == {3}
    ids = [m["sae_id"] for m in members(rest)]
    assert len(set(ids)) == len(ids) == 24 and {m["sae_id"] for m in first["members"]} < set(ids)
    assert not searcher.open, "an Optuna trial was not told"


def test_the_search_waits_for_packs_that_may_yet_be_split():
    searcher = search(pack_size=24)
    searcher.suggest("a")
    assert searcher.suggest("b") is None
    searcher.on_trial_complete("a", {"out_of_memory": True})
    assert len(searcher.suggest("b")["members"]) == 6


def test_running_out_of_memory_is_reported_by_a_pack_and_raised_by_one_sae(monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("no")

    reported = []
    monkeypatch.setattr(on_ray, "train_pack", full)
    monkeypatch.setattr(on_ray.tune, "report", reported.append)
    trial = SimpleNamespace(root=tmp_path)
    config = search(pack_size=2).suggest("a")
    on_ray.run_trial(config, trial, torch.get_num_threads(), None, 0.0)
    assert reported == [{"out_of_memory": True, "final": True}]
    with pytest.raises(torch.OutOfMemoryError):
        on_ray.run_trial(config | {"members": config["members"][:1]}, trial, torch.get_num_threads(), None, 0.0)


def test_a_pack_of_nulls_that_does_not_fit_is_trained_in_halves(monkeypatch):
    trained = []

    def train_pack(trial, site, pack, report, device):
        if len(pack) > most:
            raise torch.OutOfMemoryError("too much")
        trained.append("".join(pack))

    monkeypatch.setattr(on_ray, "train_pack", train_pack)
    most = 2
    on_ray.train_whole(None, "s", list("abcde"))
    assert trained == ["ab", "c", "de"]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        on_ray.train_whole(None, "s", ["a"])


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
            found[member["sae_id"]] = {"sae_id": member["sae_id"], "tokens": tokens, "fvu": 0.5 / (i + 1), "l0": 4.0 + i}
    flat = next(iter(found.values())) if len(config["members"]) == 1 else {"members": found}
    return {**flat, "final": False, "timesteps_total": tokens, "training_iteration": 1, "config": config}


@pytest.mark.parametrize("size", [1, 3])
def test_each_sae_of_a_pack_is_a_run_of_its_own_in_tensorboard(size, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = search(pack_size=size).suggest("a")
    pack, logger = Pack(config, tmp_path), on_ray.TensorBoard()
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
    monkeypatch.setattr(on_ray, "say", said.append)
    config = search(pack_size=3).suggest("a")
    pack = Pack(config, tmp_path)
    pack.local_experiment_path, pack.temporary_state = str(tmp_path), SimpleNamespace(location="here")
    for result in (rung(config, 1000), rung(config, 2000, drop=[0])):
        pack.last_result = result
        on_ray.SweepProgress().on_trial_result(0, [pack], pack, result)
    table = on_ray.Table()
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

    monkeypatch.setattr(on_ray, "Tuner", Tuner)
    monkeypatch.setattr(on_ray.tune, "with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "SECRET")
    trial = SimpleNamespace(root=tmp_path, recipe=SimpleNamespace(steps=1, batch_size=1))
    on_ray.run_sweep(search(), trial, on_ray.Placement(1, 1.0, 0.0, 1), 0, None, 0.0)
    assert handed and "SECRET" not in handed[0].values()


@pytest.mark.parametrize("ours", [True, False])
def test_the_key_of_weights_and_biases_is_handed_on_only_to_another_cluster(ours, monkeypatch, tmp_path):
    wandb = pytest.importorskip("ray.air.integrations.wandb")
    seen = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(on_ray.ray._private.worker, "_global_node", SimpleNamespace(is_head=lambda: ours))
    start = lambda self, *_, **__: seen.append("WANDB_API_KEY" in os.environ)  # noqa: E731
    monkeypatch.setattr(wandb.WandbLoggerCallback, "_start_logging_actor", start)
    on_ray._wandb("project", tmp_path)._start_logging_actor(None, [])
    assert seen == [not ours] and os.environ["WANDB_API_KEY"] == "k" * 40
