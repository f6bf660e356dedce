"""A trial on a tiny store: rungs, resuming to the same bits, what it writes; and the table that is read from it."""

import itertools
import json
import math
import shutil
import threading
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import sparse_rows, tiny_store

from raysae.errors import Fault
from raysae.files import read_json, write_json
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.losses import Losses
from raysae.sae.train import Member, Recipe
from raysae.sweep import trial as trials
from raysae.sweep.collect import CURVES, FACTS, curves, ended, read_rungs, training_table
from raysae.sweep.prune import Pruning
from raysae.sweep.trial import (
    ProposedPack,
    Start,
    Trial,
    ahead,
    input_scale,
    keep_state,
    last_state,
    train_pack,
    train_proposed,
    train_whole,
)

D, SITE = 8, "blocks.0.resid_post"
RECIPE = Recipe(steps=20, batch_size=16, warmup_steps=2, decay_steps=5, sparsity_warmup_steps=4, dead_after_tokens=64)
RELU = Member("relu", SAEConfig("relu", D, 24, l1_coefficient=0.1, seed=1), 3e-3)
TOPK = Member("topk", SAEConfig("topk", D, 40, k=3, seed=2), 3e-3)
WILD = Member("wild", SAEConfig("relu", D, 24, l1_coefficient=0.1, seed=3), 1e25)
METADATA = {"model_name": "toy", "context_size": 16}
HOOKS = {SITE: {"model_class_name": "AutoModelForCausalLM", "hook_name": "layers.0"}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    x = sparse_rows(150, D, seed=1)
    shards = [("train", x[:70]), ("validation", sparse_rows(40, D, seed=2)), ("train", x[70:])]
    return tiny_store(tmp_path_factory.mktemp("store"), shards)


@pytest.fixture
def trial(store, tmp_path):
    return Trial(store, RECIPE, rungs=4, stream_seed=5, root=tmp_path / "sweep", metadata=METADATA, hooks=HOOKS)


def run(trial, members, drop=lambda rung: (), stop_after=None, resume=None, state=None):
    """Train, keeping each rung and, after the rung at `stop_after` tokens, its state; then die."""
    rungs = []

    def report(rung):
        rungs.append(rung)
        if rung.tokens == stop_after:
            rung.save(state)
            raise KeyboardInterrupt
        return drop(rung)

    try:
        train_pack(trial, SITE, members, report, resume)
    except KeyboardInterrupt:
        assert stop_after is not None
    return rungs


def weights(trial, sae_id):
    return (trial.root / "saes" / sae_id / "sae_weights.safetensors").read_bytes()


def history(trial, sae_id):
    return [json.loads(line) for line in (trial.root / "history" / f"{sae_id}.jsonl").open()]


def test_rungs_are_reported_at_equal_tokens_and_the_last_is_final(trial):
    rungs = run(trial, [RELU, TOPK])
    assert [r.tokens for r in rungs] == [80, 160, 240, 320]
    assert [r.final for r in rungs] == [False, False, False, True]
    for rung in rungs:
        assert list(rung.metrics) == ["relu", "topk"]
        for sae_id, found in rung.metrics.items():
            assert found["sae_id"] == sae_id and found["tokens"] == rung.tokens and found["site"] == SITE
            assert math.isfinite(found["fvu"]) and math.isfinite(found["loss"]) and not found["diverged"]
    assert rungs[-1].metrics["topk"]["l0"] <= 3
    assert rungs[-1].metrics["relu"]["fvu"] < rungs[0].metrics["relu"]["fvu"]


def test_more_rungs_than_steps_are_as_many_as_steps(trial):
    short = replace(trial, recipe=replace(RECIPE, steps=2), rungs=7)
    assert [r.tokens for r in run(short, [RELU])] == [16, 32]


@pytest.mark.parametrize("stop_after", [80, 240, 320])
def test_a_resumed_trial_ends_with_the_same_bits(trial, tmp_path, stop_after):
    run(trial, [RELU, TOPK])
    killed = replace(trial, root=tmp_path / "killed")
    run(killed, [RELU, TOPK], stop_after=stop_after, state=tmp_path / "state")
    with (killed.root / "history/relu.jsonl").open("a") as file:  # killed between a rung's line and its state
        file.write(json.dumps({"sae_id": "relu", "tokens": stop_after + 80, "fvu": 9.0}) + "\n")
    rungs = run(killed, [RELU, TOPK], resume=tmp_path / "state")
    assert rungs[-1].final and rungs[0].tokens == min(stop_after + 80, 320)
    for sae_id in ("relu", "topk"):
        assert weights(killed, sae_id) == weights(trial, sae_id)
        whole = [line | {"train_seconds": 0} for line in history(trial, sae_id)]
        last = {line["tokens"]: line | {"train_seconds": 0} for line in history(killed, sae_id)}
        assert 9.0 not in [line["fvu"] for line in last.values()]
        assert json.dumps(list(last.values())) == json.dumps(whole)  # as text, in which NaN equals itself


def test_seconds_add_up_over_a_resume(trial, tmp_path):
    run(trial, [RELU], stop_after=160, state=tmp_path / "state")
    write_json(tmp_path / "state/trial.json", {"train_seconds": 1000.0})
    assert run(trial, [RELU], resume=tmp_path / "state")[-1].metrics["relu"]["train_seconds"] > 1000


def test_a_member_is_the_same_in_a_pack_as_alone(trial, tmp_path):
    run(trial, [RELU, TOPK])
    alone = replace(trial, root=tmp_path / "alone")
    run(alone, [TOPK])
    assert weights(alone, "topk") == weights(trial, "topk")


def test_a_dropped_member_leaves_no_sae_and_the_rest_go_on_undisturbed(trial, tmp_path):
    rungs = run(trial, [RELU, TOPK], drop=lambda rung: ["relu"] if rung.tokens == 160 else [])
    assert [list(r.metrics) for r in rungs] == [["relu", "topk"]] * 2 + [["topk"]] * 2
    assert not (trial.root / "saes/relu").exists() and len(history(trial, "relu")) == 2
    alone = replace(trial, root=tmp_path / "alone")
    run(alone, [TOPK])
    assert weights(alone, "topk") == weights(trial, "topk")


def test_a_trial_ends_when_no_member_is_left(trial):
    rungs = run(trial, [RELU, TOPK], drop=lambda rung: ["relu", "topk"])
    assert len(rungs) == 1 and not (trial.root / "saes").exists()


def test_the_saved_sae_is_the_one_that_was_measured_with_its_provenance(trial, store):
    rungs = run(trial, [TOPK])
    sae = formats.load(trial.root / "saes/topk")
    x = store.head(SITE, "validation", 99)
    f = sae.encode(x)
    fvu = (x - sae.decode(f)).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert rungs[-1].metrics["topk"]["fvu"] == pytest.approx(fvu.item(), rel=1e-5)
    assert rungs[-1].metrics["topk"]["l0"] == pytest.approx((f > 0).sum().item() / len(x))
    assert sae.metadata["hook_name"] == "layers.0" and sae.metadata["model_name"] == "toy"
    assert sae.metadata["raysae_site"] == SITE
    cfg = read_json(trial.root / "saes/topk/cfg.json")
    assert cfg["raysae"]["training"]["learning_rate"] == 3e-3 and cfg["raysae"]["training"]["steps"] == 20


def test_a_diverged_member_is_reported_and_not_saved_even_after_a_resume(trial, tmp_path):
    run(trial, [RELU, WILD], stop_after=320, state=tmp_path / "state")
    shutil.copytree(trial.root / "history", tmp_path / "againFalse/history")
    for resume in (None, tmp_path / "state"):
        rungs = run(replace(trial, root=tmp_path / f"again{resume is None}"), [RELU, WILD], resume=resume)
        assert len(rungs) == (4 if resume is None else 1)
        assert rungs[-1].metrics["wild"]["diverged"] and not rungs[-1].metrics["relu"]["diverged"]
    assert (tmp_path / "againTrue/saes/relu").exists() and not list(tmp_path.glob("again*/saes/wild"))


# ----------------------------------------------------------------------------------------------------------------------
# The table


def test_the_table_says_what_became_of_each_sae(trial):
    lost = Member("lost", SAEConfig("topk", D, 40, k=2), 1e-3)
    pruned = Member("pruned", SAEConfig("relu", D, 24, l1_coefficient=0.2), 1e-3)
    run(trial, [RELU, WILD, pruned], drop=lambda rung: ["pruned"] if rung.tokens == 160 else [])
    run(trial, [lost], stop_after=80, state=trial.root / "state")
    (trial.root / "pruned").mkdir()
    for sae_id in ("pruned", "wild"):
        write_json(trial.root / f"pruned/{sae_id}.json", {"reason": "dominated by relu"})
    common = {"d_in": D, "seed": 0, "site": SITE}
    errors = {
        "lost": {**common, "architecture": "topk", "d_sae": 40, "k": 2, "message": "out of memory"},
        "never": {**common, "architecture": "relu", "d_sae": 24, "l1_coefficient": 0.3, "message": "no GPU"},
    }
    ids = ["lost", "never", "pruned", "relu", "wild"]
    table = training_table(trial.root, errors, ids, 320, unique_tokens=100, dead_window=64).set_index("sae_id")
    assert table["status"].to_dict() == {
        "lost": "error", "never": "error", "pruned": "pruned", "relu": "completed", "wild": "diverged"
    }  # fmt: skip
    assert table["status_reason"].to_dict() == {
        "lost": "out of memory", "never": "no GPU", "pruned": "dominated by relu", "relu": "",
        "wild": "its loss is no longer finite",
    }  # fmt: skip
    assert [*table.reset_index().columns] == FACTS
    assert table.loc["relu", ["tokens", "unique_tokens", "dead_window_tokens", "d_sae"]].tolist() == [320, 100, 64, 24]
    assert table["tokens"].drop("never").to_dict() == {"lost": 80, "pruned": 160, "relu": 320, "wild": 320}
    assert table.loc["lost", "unique_tokens"] == 80
    assert table.loc["never", "d_sae"] == 24 and table.loc["relu", "expansion_factor"] == 3
    assert pd.isna(table.loc["relu", "k"]) and table.loc["lost", "k"] == 2


def test_a_sweep_whose_every_trial_failed_at_once_still_has_a_table(tmp_path):
    errors = {"a": {"architecture": "relu", "d_in": D, "d_sae": 24, "seed": 0, "site": SITE, "message": "no GPU"}}
    table = training_table(tmp_path, errors, ["a"], 320, 100, 64)
    assert table["status"].tolist() == ["error"] and table["status_reason"].tolist() == ["no GPU"]


def test_curves_keep_the_last_writing_of_a_rung(trial, tmp_path):
    run(trial, [RELU], stop_after=160, state=tmp_path / "state")
    run(trial, [RELU, TOPK])
    found = curves(trial.root)
    assert set(CURVES) <= set(found.columns)
    rungs = [80, 160, 240, 320]
    assert found.groupby("sae_id")["tokens"].apply(list).to_dict() == {"relu": rungs, "topk": rungs}
    assert len(history(trial, "relu")) == 4, "what a trial writes again is not there twice"
    with (trial.root / "history/relu.jsonl").open("a") as file:
        file.write(json.dumps(history(trial, "relu")[0] | {"fvu": 0.123}) + "\n")
    found = curves(trial.root).set_index(["sae_id", "tokens"])["fvu"]
    assert found["relu", 80] == 0.123 and len(found) == 8


def test_the_stream_depends_on_its_seed(trial, tmp_path):
    run(trial, [TOPK])
    others = {weights(trial, "topk")}
    for seed in range(4):
        other = replace(trial, root=tmp_path / str(seed), stream_seed=seed)
        run(other, [TOPK])
        others.add(weights(other, "topk"))
    assert len(others) > 1
    assert torch.is_grad_enabled()


def test_losses_on_latents_train_on_labels_and_neighbours_and_resume_to_the_same_bits(
    trial, tmp_path, tmp_path_factory
):
    x = sparse_rows(120, D, seed=6)
    columns = {"example_id": [f"e{i // 8}" for i in range(120)], "position": [i % 8 for i in range(120)]}
    columns["step"] = [i % 3 for i in range(120)]
    shards = [("train", x), ("validation", x[:30])]
    labelled = tiny_store(tmp_path_factory.mktemp("labelled"), shards, columns={0: columns})
    member = replace(TOPK, losses=Losses(probe=0.1, probe_classes=3, temporal=0.05, decorrelation=0.1))
    both = replace(trial, source=labelled, label="step", neighbours=True)
    rungs = run(both, [member])
    found = rungs[-1].metrics["topk"]
    assert all(found[f"share_{term}"] > 0 for term in ("reconstruction", "probe", "temporal", "decorrelation"))
    assert {"share_probe", "share_temporal"} <= set(curves(both.root).columns)
    assert set(formats.load(both.root / "saes/topk").parameters) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    killed = replace(both, root=tmp_path / "killed")
    run(killed, [member], stop_after=160, state=tmp_path / "state")
    run(killed, [member], resume=tmp_path / "state")
    assert weights(killed, "topk") == weights(both, "topk")


@pytest.mark.parametrize("b_dec", ["mean", "geometric_median", "zero"])
def test_where_an_sae_starts(store, b_dec):
    scale = input_scale(store, SITE, Start(b_dec, at_rows=True))
    centre = scale.mean if scale.centre is None else scale.centre
    rows = torch.cat([store.head(SITE, "train", 10**6)])
    assert torch.equal(scale.rows, rows)
    expected = {"mean": rows.mean(0), "zero": torch.zeros(D), "geometric_median": centre}[b_dec]
    torch.testing.assert_close(centre, expected)
    if b_dec == "geometric_median":
        assert (rows - centre).norm(dim=1).sum() < (rows - scale.mean).norm(dim=1).sum()


def test_reading_ahead_keeps_the_order_passes_errors_on_and_ends_its_thread():
    before = threading.active_count()
    assert list(ahead(iter(range(50)), lambda i: 2 * i)) == list(range(0, 100, 2))

    def broken():
        yield 1
        raise OSError("the disk is gone")

    stream = ahead(broken(), lambda i: i)
    assert next(stream) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    endless = ahead(itertools.count(), lambda i: i)
    assert [next(endless) for _ in range(5)] == [0, 1, 2, 3, 4]
    endless.close()
    assert threading.active_count() == before


# ----------------------------------------------------------------------------------------------------------------------
# What an interrupt leaves


def test_a_table_is_refused_while_one_sae_has_no_end(trial):
    run(trial, [RELU])
    run(trial, [TOPK], stop_after=160, state=trial.root / "state")
    with pytest.raises(Fault, match=r"1 of 2 SAEs are not trained to their end, such as topk; the same command"):
        training_table(trial.root, {}, ["relu", "topk"], 320, 100, 64)
    with pytest.raises(Fault, match="such as never"):
        training_table(trial.root, {}, ["relu", "never"], 320, 100, 64)
    assert list(training_table(trial.root, {}, ["relu"], 320, 100, 64)["sae_id"]) == ["relu"]  # of what was asked


@pytest.mark.parametrize("damage", ["weights", "cfg", "history", "nothing"])
def test_an_sae_has_ended_only_if_it_is_there_whole(trial, damage):
    run(trial, [RELU, WILD, TOPK], drop=lambda rung: ["topk"] if rung.tokens == 160 else [])
    assert set(ended(trial.root, 320)) == {"relu", "wild"}
    write_json(trial.root / "pruned.json", {})
    (trial.root / "pruned").mkdir()
    write_json(trial.root / "pruned/topk.json", {"reason": "dominated"})
    file = {
        "weights": "saes/relu/sae_weights.safetensors", "cfg": "saes/relu/cfg.json", "history": "history/relu.jsonl",
        "nothing": "pruned.json",
    }[damage]  # fmt: skip
    half(trial.root / file)
    found = ended(trial.root, 320)
    assert set(found) == {"wild", "topk"} | ({"relu"} if damage == "nothing" else set())
    assert found["topk"]["tokens"] == 160 and found["wild"]["diverged"]
    half(trial.root / "pruned/topk.json")
    assert "topk" not in ended(trial.root, 320)


def half(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damaged", ["pack.json", "0.safetensors", "trial.json", "gone", "another's"])
def test_from_half_a_state_a_pack_begins_anew_and_ends_with_the_same_bits(trial, tmp_path, damaged):
    run(trial, [RELU, TOPK])
    killed = replace(trial, root=tmp_path / "killed")
    state = tmp_path / "state"
    run(killed, [TOPK] if damaged == "another's" else [RELU, TOPK], stop_after=160, state=state)
    if damaged == "gone":
        (state / "1.safetensors").unlink()
    elif damaged != "another's":
        half(state / damaged)
    rungs = run(killed, [RELU, TOPK], resume=state)
    assert rungs[0].tokens == 80 and len(history(killed, "relu")) == 4
    assert all(weights(killed, i) == weights(trial, i) for i in ("relu", "topk"))


def test_a_pack_goes_on_without_the_members_that_have_ended(trial, tmp_path):
    run(trial, [RELU, TOPK])
    killed = replace(trial, root=tmp_path / "killed")
    run(killed, [RELU, TOPK], stop_after=240, state=tmp_path / "state")
    rungs = run(killed, [TOPK], resume=tmp_path / "state")
    assert [list(r.metrics) for r in rungs] == [["topk"]] and weights(killed, "topk") == weights(trial, "topk")


@pytest.mark.parametrize("at", ["end", "middle", "only"])
def test_half_a_line_of_history_is_written_again(trial, tmp_path, at):
    run(trial, [RELU])
    killed = replace(trial, root=tmp_path / "killed")
    run(killed, [RELU], stop_after=160, state=tmp_path / "state")
    file = killed.root / "history/relu.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    broken = {"end": "".join(lines)[:-40], "middle": lines[0][:50] + "\n" + lines[1], "only": lines[0][:50]}[at]
    file.write_text(broken)
    assert ended(killed.root, 320) == {} and len(read_rungs(file)) == (at == "end")
    rungs = run(killed, [RELU], resume=tmp_path / "state")
    assert rungs[0].tokens == 80, "a state whose rungs are not in the history"
    assert [line["tokens"] for line in history(killed, "relu")] == [80, 160, 240, 320]
    assert weights(killed, "relu") == weights(trial, "relu")


def test_the_last_state_is_kept_and_a_half_written_one_is_none(trial, tmp_path):
    folder = tmp_path / "state"
    run(trial, [RELU], drop=lambda rung: keep_state(folder, rung) or ())
    (kept,) = folder.iterdir()
    assert last_state(folder) == kept and kept.name.endswith("000320") and last_state(tmp_path / "none") is None
    (folder / ".000000000000400.tmp").mkdir()
    assert last_state(folder) == kept


# ----------------------------------------------------------------------------------------------------------------------
# Packs that a search proposes


def test_running_out_of_memory_is_said_of_a_pack_and_raised_by_one_sae(monkeypatch, trial):
    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(trials, "train_pack", full)
    assert not train_proposed(trial, ProposedPack(SITE, (RELU, TOPK), "a"), Pruning(), lambda rung: {})
    with pytest.raises(torch.OutOfMemoryError):
        train_proposed(trial, ProposedPack(SITE, (RELU,), "a"), Pruning(), lambda rung: {})


def test_a_pack_of_nulls_that_does_not_fit_is_trained_in_halves(monkeypatch):
    trained = []

    def train_pack(trial, site, pack, report, device):
        if len(pack) > most:
            raise torch.OutOfMemoryError("too much")
        trained.append("".join(pack))

    monkeypatch.setattr(trials, "train_pack", train_pack)
    most = 2
    train_whole(None, "s", list("abcde"))
    assert trained == ["ab", "c", "de"]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        train_whole(None, "s", ["a"])
