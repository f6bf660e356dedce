"""Both benches do the same work with the same bits; the plain loop prunes, splits packs, tries again and goes on."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import sparse_rows, tiny_store

from raysae.activations.capture import Capture, CaptureSettings, finish
from raysae.activations.store import Store
from raysae.bench import Bench, LocalBench
from raysae.config.sections import ClusterConfig
from raysae.data.sources import load_problems
from raysae.data.splits import assign_splits
from raysae.data.tokens import tokenize
from raysae.errors import UserError
from raysae.files import read_json, write_json
from raysae.models.host import fingerprint_of, load_tokenizer
from raysae.sae.architectures import SAEConfig
from raysae.sae.train import Member, Pack
from raysae.sweep import trial as trials
from raysae.sweep.collect import asked, curves, ended, pruned, training_table
from raysae.sweep.prune import Pruning, Stop
from raysae.sweep.search import PackSearch
from raysae.sweep.space import Common, proposals, recipe
from raysae.sweep.trial import Trial

SITE, D = "blocks.1.resid_post", 8
SHARED = recipe(4096, 128, 0.1, 0.2, 0.1, 512)
COMMON = Common(base_learning_rate=5e-4)
GRID = {"relu": [0.05, 50.0], "topk": [2, 4]}
EAGER = Pruning(0.02, 1024)
RANGES = {"relu": (0.01, 100.0)}


@dataclass
class Sweep:
    """A small sweep over a store below `root`."""

    store: Store
    root: Path
    grid: bool = True
    pack_size: int = 1

    def __post_init__(self) -> None:
        (site,) = self.store.sites
        self.widths = {site: self.store.d_model(site)}
        if self.grid:
            self.plan = proposals(self.widths, ["relu", "topk"], [2, 4], GRID, 0)
        else:  # Optuna draws its first ten at random
            self.plan = proposals(self.widths, ["relu"], [2, 4], None, 7)
        self.trial = Trial(self.store, SHARED, 4, 0, self.root, {"model_name": "toy"})

    def with_a_better_one(self) -> "Sweep":
        """After an earlier driver, in which an SAE was better at half of the tokens than those of its width."""
        (site, d_in), *_ = self.widths.items()
        rung = {"sae_id": "better", "site": site, "architecture": "relu", "d_sae": 2 * d_in, "tokens": 2048}
        (self.root / "history").mkdir(parents=True)
        numbers = {"fvu": 0.0, "l0": 0.2, "loss": 0.0, "dead_fraction": 0.0, "learning_rate": 0.0, "diverged": False}
        (self.root / "history" / "better.jsonl").write_text(json.dumps(rung | numbers) + "\n")
        return self

    def run(self, bench: Bench, pruning: Pruning = Pruning()) -> pd.DataFrame:  # noqa: B008
        before = ended(self.root, self.trial.tokens)
        search = PackSearch(self.plan, self.widths, RANGES, [0], COMMON, self.pack_size, 0, self.root, before)
        self.failed = bench.search(search, self.trial, pruning)
        self.search = search
        return self.table()

    def table(self) -> pd.DataFrame:
        ids = asked(self.plan, self.widths, [0], COMMON, self.root)
        table = training_table(self.root, self.failed, ids, self.trial.tokens, self.store.rows("train"), 512)
        return table.drop(columns="train_seconds").set_index("sae_id")


def hashes(folder: Path) -> dict[str, str]:
    """Of each file of weights or activations."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }


# ----------------------------------------------------------------------------------------------------------------------
# The same bits


@pytest.fixture(scope="module")
def ray_bench(ray_cluster):
    """With one trial at a time, which has both of the cluster's CPUs, as the hosts do."""
    from raysae.on_ray.bench import RayBench

    return RayBench(ClusterConfig(cpus_per_trial=2))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def captured(ray_bench, arithmetic_model, tmp_path_factory) -> dict[str, Store]:
    """The store of a small model's activations, from each bench."""
    root = tmp_path_factory.mktemp("captured")
    tokenizer = load_tokenizer(str(arithmetic_model))
    problems = assign_splits(load_problems("arithmetic", examples=150), 0.1, 0.1, None, 0)
    blocks = tokenize(problems, tokenizer, 96, "problems", 1500, 0, root / "tokens")["blocks"]
    settings = CaptureSettings((SITE,), "bfloat16", 2048, 0)
    model = {"name": str(arithmetic_model), "revision": None, "dtype": "float32", "trust_remote_code": False}
    made = fingerprint_of(str(arithmetic_model), None, False)
    stores = {}
    torch.set_num_threads(2)
    for name, bench in {"local": LocalBench(), "ray": ray_bench}.items():
        store = root / name
        store.mkdir()
        assert bench.over_blocks("capture", blocks, root / "tokens", model, Capture(store, settings)) > 0
        write_json(store / "manifest.json", finish(store, blocks, settings, made, 0.0))
        stores[name] = Store(store)
    torch.set_num_threads(1)
    return stores


def test_a_store_has_the_same_bits(captured):
    local, ray = (captured[name].path for name in ("local", "ray"))
    assert len(hashes(local)) > 2 and hashes(local) == hashes(ray)
    assert read_json(local / "manifest.json") == read_json(ray / "manifest.json")


@pytest.mark.parametrize(
    ("grid", "pack_size", "pruning"),
    [(True, 1, Pruning()), (True, 6, EAGER), (False, 1, EAGER)],
    ids=["grid", "pruned packs", "optuna"],
)
def test_a_sweep_has_the_same_bits(ray_bench, two_threads, captured, tmp_path, grid, pack_size, pruning):
    sweeps = {name: Sweep(captured["local"], tmp_path / name, grid, pack_size) for name in ("local", "ray")}
    if pruning.margin is not None:
        sweeps = {name: sweep.with_a_better_one() for name, sweep in sweeps.items()}
    tables = {name: sweeps[name].run({"local": LocalBench(), "ray": ray_bench}[name], pruning) for name in sweeps}
    pd.testing.assert_frame_equal(tables["local"], tables["ray"], check_exact=True)
    local, ray = (sweeps[name].root for name in ("local", "ray"))
    pd.testing.assert_frame_equal(curves(local), curves(ray), check_exact=True)
    assert hashes(local / "saes") == hashes(ray / "saes")
    assert {f.name: f.read_text() for f in local.glob("p*ed/*")} == {f.name: f.read_text() for f in ray.glob("p*ed/*")}
    status = tables["local"]["status"].value_counts().to_dict()
    assert status["completed"] > 0 and ("pruned" in status) == (pruning.margin is not None)
    assert sum(status.values()) == len(sweeps["local"].plan)


def test_packs_outside_of_a_search_have_the_same_bits(ray_bench, two_threads, captured, tmp_path):
    found = {}
    for name, bench in {"local": LocalBench(), "ray": ray_bench}.items():
        sweep = Sweep(captured["local"], tmp_path / name)
        members = [Member(f"sae{i}", SAEConfig("topk", sweep.widths[SITE], 64, k=4, seed=i), 1e-3) for i in range(2)]
        assert bench.train("train", sweep.trial, {SITE: members}) > 0
        found[name] = hashes(sweep.root / "saes")
    assert len(found["local"]) == 2 and found["local"] == found["ray"]


def test_calls_at_once_give_their_results_in_order(ray_bench):
    for bench in (LocalBench(), ray_bench):
        called = bench.at_once(partial(max, 2), [(i,) for i in range(4)], bench.trials())
        assert [result for _, result in called] == [2, 2, 2, 3] and all(began >= 0 for began, _ in called)


# ----------------------------------------------------------------------------------------------------------------------
# The plain loop


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    shards = [("train", sparse_rows(1200, D, seed=1)), ("validation", sparse_rows(300, D, seed=2))]
    return tiny_store(tmp_path_factory.mktemp("store"), shards)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Sweep:
    """A sweep that nothing disturbed."""
    sweep = Sweep(store, tmp_path_factory.mktemp("whole"))
    assert set(sweep.run(LocalBench())["status"]) == {"completed"}
    return sweep


def same(sweep: Sweep, whole: Sweep) -> None:
    assert hashes(sweep.root / "saes") == hashes(whole.root / "saes")
    pd.testing.assert_frame_equal(sweep.table(), whole.table(), check_exact=True)
    pd.testing.assert_frame_equal(curves(sweep.root), curves(whole.root), check_exact=True)
    assert not list((sweep.root / "state").glob("*/*"))


def test_a_sweep_that_is_done_trains_nothing(store, whole, monkeypatch):
    monkeypatch.setattr(trials, "train_pack", lambda *_: pytest.fail("it trained"))
    again = Sweep(store, whole.root)
    again.run(LocalBench())
    same(again, whole)


@pytest.mark.parametrize("pack_size", [3, 8])
def test_saes_of_a_pack_have_the_bits_of_those_alone(store, whole, tmp_path, pack_size):
    sweep = Sweep(store, tmp_path, pack_size=pack_size)
    sweep.run(LocalBench())
    same(sweep, whole)


def test_a_pack_that_does_not_fit_is_trained_in_halves(store, whole, tmp_path, monkeypatch):
    tried = []

    class Small(Pack):
        def __init__(self, members, *given):
            tried.append(len(members))
            if len(members) > 2:
                raise torch.OutOfMemoryError("no room")
            super().__init__(members, *given)

    monkeypatch.setattr(trials, "Pack", Small)
    sweep = Sweep(store, tmp_path, pack_size=8)
    sweep.run(LocalBench())
    assert tried == [8, 4, 2, 2, 2, 2] and sweep.search.pack_size == 2
    same(sweep, whole)


def fail_at(monkeypatch, moments: list[int]) -> None:
    """Let the trial fail that keeps its state for the n-th time in the sweep, for each n of `moments`."""
    keep, kept = trials.keep_state, []

    def keep_or_fail(folder, rung):
        keep(folder, rung)
        kept.append(folder)
        if len(kept) in moments:
            raise OSError(f"at {len(kept)}\nagain")

    monkeypatch.setattr(trials, "keep_state", keep_or_fail)


def test_a_trial_that_fails_is_tried_again_from_its_state(store, whole, tmp_path, monkeypatch):
    fail_at(monkeypatch, [2, 3])
    begun = []
    load = Pack.load
    monkeypatch.setattr(Pack, "load", lambda pack, folder: (begun.append(folder.name), load(pack, folder)))
    sweep = Sweep(store, tmp_path)
    sweep.run(LocalBench(max_restarts=2))
    assert [int(name) for name in begun] == [2048, 3072] and not sweep.failed
    same(sweep, whole)


def test_one_that_fails_for_good_is_noted_and_the_rest_goes_on(store, whole, tmp_path, monkeypatch):
    fail_at(monkeypatch, [1, 2])
    sweep = Sweep(store, tmp_path)
    table = sweep.run(LocalBench(max_restarts=1))
    (failed,) = sweep.failed
    assert table["status"].value_counts().to_dict() == {"completed": 7, "error": 1}
    assert table.loc[failed, "status_reason"] == sweep.failed[failed]["message"] == "again"
    assert table.loc[failed, "d_sae"] == sweep.failed[failed]["d_sae"]
    monkeypatch.undo()
    sweep.run(LocalBench())
    same(sweep, whole)


def test_an_interrupted_sweep_goes_on_to_the_same_bits(store, whole, tmp_path, monkeypatch):
    keep = trials.keep_state
    for moment in (1, 5, 12):
        kept = []

        def keep_or_stop(folder, rung, kept=kept, moment=moment):
            keep(folder, rung)
            kept.append(folder)
            if len(kept) == moment:
                raise KeyboardInterrupt

        monkeypatch.setattr(trials, "keep_state", keep_or_stop)
        with pytest.raises(KeyboardInterrupt):
            Sweep(store, tmp_path).run(LocalBench())
    monkeypatch.undo()
    sweep = Sweep(store, tmp_path)
    sweep.run(LocalBench())
    same(sweep, whole)


@pytest.mark.parametrize("pack_size", [1, 6])
def test_what_is_pruned_is_stopped_and_stays_so(store, tmp_path, pack_size):
    sweep = Sweep(store, tmp_path, pack_size=pack_size).with_a_better_one()
    table = sweep.run(LocalBench(), EAGER)
    stopped = table[table["status"] == "pruned"]
    assert 0 < len(stopped) < len(table) and (stopped["tokens"] >= 1024).all() and (stopped["tokens"] < 4096).all()
    assert stopped["status_reason"].str.contains("collapsed").any()
    assert stopped["status_reason"].str.contains("dominated by better").any() == (pack_size == 1)
    for sae_id, row in stopped.iterrows():
        assert row["status_reason"] == pruned(tmp_path, str(sae_id)) and not (tmp_path / "saes" / str(sae_id)).exists()
    pd.testing.assert_frame_equal(Sweep(store, tmp_path, pack_size=pack_size).run(LocalBench()), table)


def test_a_replay_stops_where_it_says(store, whole, tmp_path):
    first = whole.table().index[0]
    sweep = Sweep(store, tmp_path)
    table = sweep.run(LocalBench(), Pruning(stops={first: Stop(2000, "as it was")}))
    assert table.loc[first, ["status", "status_reason", "tokens"]].tolist() == ["pruned", "as it was", 2048]
    left = {f"{i}/sae_weights.safetensors" for i in table.index if i != first}
    assert hashes(sweep.root / "saes") == {i: h for i, h in hashes(whole.root / "saes").items() if i in left}


def test_a_search_taken_up_chooses_the_same(store, tmp_path, monkeypatch):
    whole = Sweep(store, tmp_path / "whole", grid=False)
    whole.run(LocalBench())
    fail_at(monkeypatch, [20])
    monkeypatch.setattr(LocalBench, "search", stopping(LocalBench.search))
    sweep = Sweep(store, tmp_path / "stopped", grid=False)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(LocalBench(max_restarts=0))
    monkeypatch.undo()
    shutil.rmtree(sweep.root / "state")
    sweep.run(LocalBench())
    same(sweep, whole)


def stopping(search):
    """A search whose driver is interrupted where a trial would fail for good."""

    def stop(bench, packs, *given):
        def interrupt(pack):
            raise KeyboardInterrupt

        packs.failed = interrupt
        return search(bench, packs, *given)

    return stop


def test_a_mistake_in_a_block_is_raised_as_it_is(arithmetic_model, tmp_path):
    def refuse(host, block):
        raise UserError(f"no {block.name}")

    problems = assign_splits(load_problems("arithmetic", examples=30), 0.1, 0.1, None, 0)
    blocks = tokenize(problems, load_tokenizer(str(arithmetic_model)), 96, "problems", 1500, 0, tmp_path)["blocks"]
    model = {"name": str(arithmetic_model), "revision": None, "dtype": "float32", "trust_remote_code": False}
    with pytest.raises(UserError, match=f"^no {blocks[0]['name']}$"):
        LocalBench().over_blocks("read", blocks, tmp_path, model, refuse)
    assert LocalBench().over_blocks("read", [], tmp_path, {"name": "no model is loaded"}, refuse) < 1
