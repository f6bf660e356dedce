"""Fidelity metrics against the definitions, computed one unpadded sequence at a time with plain hooks on a tiny GPT-2."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BOS, D_MODEL, block_entry, tiny_block, tiny_host, tiny_store

from raysae.activations.capture import CaptureSettings, capture_block, finish
from raysae.activations.store import Store
from raysae.data.tokens import TokenBlock
from raysae.evaluate import fidelity, stability
from raysae.evaluate.fidelity import RANKED, SCORE_SUMS, Measurement, Paired, collect, measure_block, values_of
from raysae.evaluate.rows import ROW_SUMS, done, row_sums, usual_rows
from raysae.evaluate.statistics import Bootstrap, intervals
from raysae.files import write_json
from raysae.gates.metrics import METRICS
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig, initial_parameters
from raysae.sae.sae import SAE

SITE = "blocks.0.resid_post"


def saes():
    """Two random SAEs, the identity, and the mean predictor."""
    relu = SAEConfig("relu", D_MODEL, 24, l1_coefficient=0.1, seed=1)
    topk = SAEConfig("topk", D_MODEL, 24, k=5, seed=2)
    pair = SAEConfig("relu", D_MODEL, 2 * D_MODEL, l1_coefficient=0.1)
    eye = torch.eye(D_MODEL)
    identity = {
        "W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * D_MODEL),
        "W_dec": torch.cat([eye, -eye]), "b_dec": torch.zeros(D_MODEL),
    }  # fmt: skip
    return {
        "relu": SAE(relu, initial_parameters(relu, torch.full((D_MODEL,), 0.3))),
        "topk": SAE(topk, initial_parameters(topk, torch.full((D_MODEL,), -0.2))),
        "identity": SAE(pair, identity),
    }


def joined(one: TokenBlock, two: TokenBlock) -> TokenBlock:
    """Both blocks' sequences as one block."""
    names = ("input_ids", "positions", "step", "loss_mask", "groups", "example_ids")
    lists = {name: getattr(one, name) + getattr(two, name) for name in names}
    example = one.example + [e + len(one.example_ids) for e in two.example]
    ids = np.concatenate([one.sequence_id, two.sequence_id])
    return TokenBlock(name="validation-00009-99", split=one.split, sequence_id=ids, example=example, **lists)


def spoken(host, block: TokenBlock) -> TokenBlock:
    """The block with the tokens that the host finds likeliest, so that damage to it raises cross-entropy."""
    for ids in block.input_ids:
        for t in range(1, len(ids) - 1):
            if ids[t + 1] != BOS:
                logits = host.logits(torch.from_numpy(ids[None, : t + 1]), None)[0, -1]
                ids[t + 1] = int(logits[BOS + 1 :].argmax()) + BOS + 1
    return block


class World:
    """A host, a store of a training block and two validation blocks (and the two as one), and SAEs on disk."""

    def __init__(self, root):
        self.root, self.host = root, tiny_host()
        train = tiny_block("train", 0)
        self.blocks = [spoken(self.host, tiny_block("validation", i, examples=21, groups=12)) for i in (0, 1)]
        self.both = joined(*self.blocks)
        every = [train, *self.blocks, self.both]
        settings = CaptureSettings((SITE,), "float32", 24, 0)
        for block in every:
            capture_block(self.host, block, root / "store", settings)
        manifest = finish(root / "store", [block_entry(b) for b in every], settings, self.host.fingerprint, 0)
        write_json(root / "store/manifest.json", manifest)
        self.store, self.saes = Store(root / "store"), saes()
        for sae_id, sae in self.saes.items():
            formats.save(sae, root / "saes" / sae_id)
        self.task = Measurement(
            root / "store", SITE, tuple((i, root / "saes" / i) for i in self.saes), root / "found", 24, 1.0
        )
        for block in every:
            measure_block(self.host, block, self.task)

    def collect(self, *blocks, task=None):
        root = (task or self.task).root
        return collect(root, [b.name for b in blocks], self.store.mean(SITE), Bootstrap(200, 0.95, 0))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("fidelity"))


def logits_with(host, ids, change):
    """Logits of one unpadded sequence with `change` applied to the output of block 0."""

    def hook(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        new = change(first[0])[None]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = host.model.transformer.h[0].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return host.model(input_ids=torch.from_numpy(ids)[None]).logits[0].double()
    finally:
        handle.remove()


def reference(world, sae, block):
    """Every metric by its definition: cross-entropy and KL over pairs of kept tokens, edits at kept tokens only."""
    mean = world.store.mean(SITE).float()
    sums = dict.fromkeys(("clean", "zero", "mean", "spliced", "kl", "kl_zero", "kl_mean"), 0.0)
    n, rows = 0, []
    for ids in block.input_ids:
        kept = torch.from_numpy(ids != BOS)[:, None]
        changes = {
            "clean": lambda x: x,
            "zero": lambda x, kept=kept: torch.where(kept, torch.zeros_like(x), x),
            "mean": lambda x, kept=kept: torch.where(kept, mean, x),
            "spliced": lambda x, kept=kept: torch.where(kept, sae(x), x),
        }
        with torch.no_grad():
            hidden = world.host.model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[
                1
            ][0]
        rows.append(hidden[kept[:, 0]])
        log_p = {name: logits_with(world.host, ids, change).log_softmax(-1) for name, change in changes.items()}
        for t in range(len(ids) - 1):
            if ids[t] != BOS and ids[t + 1] != BOS:
                n += 1
                p = log_p["clean"][t].exp()
                for name, values in log_p.items():
                    sums[name] -= values[t, ids[t + 1]].item()
                    if name != "clean":
                        column = "kl" if name == "spliced" else f"kl_{name}"
                        sums[column] += (p * (log_p["clean"][t] - values[t])).sum().item()
    x = torch.cat(rows).double()
    f = sae.encode(x.float())
    x_hat = sae.decode(f).double()
    ce = {name: value / n for name, value in sums.items()}
    return {
        "fvu": ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(),
        "l0": (f > 0).sum().item() / len(x),
        "l1": f.sum().item() / len(x),
        "relative_reconstruction_bias": (x_hat.square().sum() / (x * x_hat).sum()).item(),
        "ev_resid_var": 1 - ((x - x_hat).var(0).sum() / x.var(0).sum()).item(),
        "ev_global": 1 - ((x - x_hat).var() / x.var()).item(),
        "ce_clean": ce["clean"], "ce_zero": ce["zero"], "ce_mean": ce["mean"], "ce_spliced": ce["spliced"],
        "ce_delta": ce["spliced"] - ce["clean"],
        "ce_loss_recovered": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        "ce_recovered_mean": (ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]),
        "kl": ce["kl"], "kl_zero": ce["kl_zero"], "kl_mean": ce["kl_mean"],
        "n_scored_tokens": n, "n_rows": len(x),
        "never_fired_fraction": (f > 0).any(0).logical_not().double().mean().item(),
        "dense_fraction": ((f > 0).double().mean(0) > 0.1).double().mean().item(),
    }  # fmt: skip


@pytest.mark.parametrize("sae_id", ["relu", "topk"])
def test_metrics_equal_their_definitions(world, sae_id):
    found = world.collect(*world.blocks)[sae_id]
    expected = reference(world, world.saes[sae_id], world.both)
    assert expected["ce_zero"] - expected["ce_clean"] > 0.05 and expected["kl"] > 0.01, "the toy shows no damage"
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_identity_costs_nothing(world):
    found = world.collect(world.both)["identity"]
    assert found["ce_delta"] == pytest.approx(0, abs=1e-6) and found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["fvu"] == pytest.approx(0, abs=1e-12) and found["explained_variance"] == pytest.approx(1, abs=1e-12)
    assert found["ce_loss_recovered"] == pytest.approx(1, abs=1e-5)
    assert found["l0"] == pytest.approx(D_MODEL)


def close(found, expected, rel):
    """Equal but for rounding, of which the ends of an interval of few groups make much."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        at_most = 1e-3 if name.endswith(("_low", "_high")) else rel
        assert found[name] == pytest.approx(value, rel=at_most, abs=rel / 10, nan_ok=True), name


def test_two_blocks_are_one_pass(world):
    two, one = world.collect(*world.blocks), world.collect(world.both)
    assert list(two) == list(one) == list(world.saes)
    for sae_id in one:
        close(two[sae_id], one[sae_id], 1e-5)
        assert one[sae_id]["n_groups"] == 12


def test_differences_are_read_from_the_blocks_on_disk(world):
    metrics = world.collect(*world.blocks)
    paired = Paired.read([world.task.root], [b.name for b in world.blocks], metrics, Bootstrap(200, 0.95, 0))
    for name in ("fvu", "kl", "ce_delta"):
        value, low, high = paired.difference("relu", "topk", lambda m, name=name: m[name])
        assert value == pytest.approx(metrics["relu"][name] - metrics["topk"][name]) and low < value < high


def test_sums_by_group_add_up_to_the_block(world):
    block = world.blocks[0]
    table = pd.read_parquet(world.task.root / f"{block.name}.parquet")
    pairs = {g: 0 for g in block.groups}
    rows = {g: 0 for g in block.groups}
    for ids, example in zip(block.input_ids, block.example, strict=True):
        kept = ids != BOS
        rows[block.groups[example[0]]] += int(kept.sum())
        pairs[block.groups[example[0]]] += int((kept[1:] & kept[:-1]).sum())
    for sae_id, part in table.groupby("sae_id"):
        by_group = part.set_index("group")
        assert by_group["rows"].to_dict() == rows and by_group["scored"].to_dict() == pairs
        found = world.collect(block)[str(sae_id)]
        assert by_group["nll_clean"].sum() / by_group["scored"].sum() == pytest.approx(found["ce_clean"])
    assert set(table.columns) == {"group", "sae_id", *ROW_SUMS, *SCORE_SUMS}
    assert not table.isna().any().any()


def test_intervals_hold_the_value_and_rest_on_the_same_formula(world):
    found = world.collect(*world.blocks)["relu"]
    for name in RANKED:
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
        assert found[f"{name}_low"] < found[f"{name}_high"]
    table = pd.concat([pd.read_parquet(world.task.root / f"{b.name}.parquet") for b in world.blocks])
    total = table[table["sae_id"] == "relu"].sum(numeric_only=True)
    x = torch.cat([world.store.shard(SITE, b.name) for b in world.blocks]).double()
    exact = (x - x.mean(0)).square().sum() / (x - world.store.mean(SITE)).square().sum()
    for name, value in zip(
        RANKED, values_of([*RANKED], exact.item(), total.index)(total.to_numpy()[None])[0], strict=True
    ):
        assert value == pytest.approx(found[name], rel=1e-9), name
    assert found["explained_variance_low"] == pytest.approx(1 - found["fvu_high"])


def test_a_difference_is_paired_by_group():
    """Two SAEs whose errors rise and fall with the group: apart, their intervals overlap; together, none doubts which is
    better."""
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in range(60)]
    hard = rng.gamma(1.0, size=60)

    def sums(share):
        columns = dict.fromkeys([*ROW_SUMS, *SCORE_SUMS], np.ones(60))
        made = pd.DataFrame(columns, index=groups) * 100.0
        return made.assign(squared_error=share * hard * (1 + 0.02 * rng.standard_normal(60)), squared_shifted=1.0)

    by = {"a": sums(0.10), "b": sums(0.11), "other": sums(0.1).rename(index=lambda g: f"{g}x")}
    paired = Paired(by, dict.fromkeys(by, 1.0), Bootstrap(500, 0.95, 3))
    draws = Bootstrap(500, 0.95, 0)
    ends = {i: intervals(by[i].to_numpy(), values_of(["fvu"], 1.0, by[i].columns), draws) for i in ("a", "b")}
    assert ends["a"].high > ends["b"].low
    found = {i: by[i].squared_error.sum() / 60 for i in ("a", "b")}
    value, low, high = paired.difference("a", "b", lambda m: m.fvu)
    assert value == pytest.approx(found["a"] - found["b"]) and low < value < high < 0
    logs = paired.difference("a", "b", lambda m: np.log(m.fvu * m.l0))
    assert logs[0] == pytest.approx(np.log(found["a"] / found["b"])) and logs[2] < 0
    assert paired.difference("a", "a", lambda m: m.fvu) == (0.0, 0.0, 0.0)
    assert paired.difference("a", "other", lambda m: m.fvu) is None and paired.difference("a", "c", len) is None


def test_every_metric_that_can_gate_has_an_interval():
    """But for facts, for the dead latents of training, and for those that need each latent's firings by group."""
    facts = {"d_in", "d_sae", "expansion_factor", "n_rows", "n_scored_tokens"}
    without = {"dead_fraction", "never_fired_fraction", "dense_fraction", "effective_latents"}
    assert {*RANKED, "l0_fraction", "l0_per_dim", "l0_effective"} - {"ce_zero_gap", "ce_mean_gap"} == {
        *METRICS
    } - facts - without - {*stability.COLUMNS}


def of_rows(tmp_path, sae, x):
    """Totals of an SAE over 3000 rows in two shards of validation, after 1000 of training."""
    store = tiny_store(tmp_path, [("train", x[:1000]), ("validation", x[:2000]), ("validation", x[2000:])], SITE)
    found = [row_sums({"sae": sae}, store, SITE, name)["sae"][1] for name in store.names("validation")]
    return pd.concat(found).sum()


def rows_of_norm(share, factor, rows=3000):
    """Rows off the origin, of which every 1/share-th is `factor` times as long."""
    x = torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(0)) + 1
    outlying = torch.zeros(rows, dtype=torch.bool)
    if share:
        outlying[:: round(1 / share)] = True
    return torch.where(outlying[:, None], x * factor, x), outlying


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.25])
def test_fvu_without_the_rows_of_huge_norm_does_not_depend_on_how_many_there_are(tmp_path, monkeypatch, share):
    """The SAE reconstructs the huge rows alone. FVU falls with their number; without them it is 1, as it should be."""
    monkeypatch.setattr("raysae.evaluate.rows.ROWS_AT_ONCE", 700)
    x, outlying = rows_of_norm(share, 250.0)

    class SinkOnly(SAE):
        def reconstruct(self, rows):
            _, f = super().reconstruct(rows)
            return torch.where((rows.norm(dim=1) > 100)[:, None], rows, x[~outlying].mean(0)), f

    one = saes()["topk"]
    total = of_rows(tmp_path, SinkOnly(one.config, one.parameters), x)
    found = fidelity._top_norms(total)
    assert found["fvu_without_top_norms"] == pytest.approx(1.0, abs=5e-3)
    assert found["top_norms_rows"] == pytest.approx(outlying.float().mean().item())
    if share:
        assert total.squared_error / total.squared_shifted < 0.05 and found["fvu_top_norms"] == pytest.approx(
            0, abs=1e-9
        )
        assert found["top_norms_variance"] > 0.95
    else:
        fvu = (total.squared_error / total.squared_shifted).item()
        assert found["fvu_without_top_norms"] == pytest.approx(fvu, rel=1e-6)
        assert found["top_norms_variance"] == 0 and np.isnan(found["fvu_top_norms"])


def test_norms_of_ordinary_rows_are_usual(tmp_path):
    """Log-normal norms, and ones that hardly differ, have no outliers; nor have rows most of which are one and the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, D_MODEL, generator=generator)
    unit = x / x.norm(dim=1, keepdim=True)
    same = torch.ones(4000, D_MODEL).index_copy(0, torch.arange(0, 4000, 3), x[::3])
    wide = unit * torch.randn(4000, 1, generator=generator).mul(0.8).exp()
    for i, rows in enumerate((unit, wide, x + 50, same)):
        store = tiny_store(tmp_path / str(i), [("train", rows)], SITE)
        assert usual_rows(store, SITE).of(rows).all(), i
    far = (x + 50).index_copy(0, torch.tensor([7]), 30 * x[7:8] + 50)  # from the others: its norm about 0 is as theirs
    of_far = usual_rows(tiny_store(tmp_path / "far", [("train", far)], SITE), SITE).of(far)
    assert (~of_far).nonzero().tolist() == [[7]]
    held_out = tiny_store(
        tmp_path / "held_out", [("test", unit)], SITE
    )  # a dataset to transfer to has no training rows
    assert usual_rows(held_out, SITE).of(unit).all()


def test_effective_latents_count_those_that_share_the_firings():
    even = torch.tensor([50.0] * 16)
    assert fidelity.effective_latents(even) == pytest.approx(16)
    assert fidelity.effective_latents(torch.cat([even, torch.zeros(1000)])) == pytest.approx(16)  # dead
    rare = torch.cat([even * 100, torch.full((4000,), 5.0)])
    assert 16 < fidelity.effective_latents(rare) < 28  # 4016 fire
    density = torch.tensor([0.9, 0.5, 0.1, 0.0])
    l0, behind_a_firing = density.sum(), (density * density).sum() / density.sum()
    assert l0 / fidelity.effective_latents(density * 1000) == pytest.approx(behind_a_firing.item())
    assert fidelity.effective_latents(torch.zeros(5)) == fidelity.effective_latents(None) == 0


@pytest.mark.parametrize("cost,defined", [(-0.5, False), (0.02, False), (0.5, True)])
def test_a_share_of_the_loss_by_ablation_needs_a_clear_loss(world, tmp_path, monkeypatch, cost, defined):
    """Where the model is no worse, or not clearly, with the site ablated, there is nothing to recover."""
    rng = np.random.default_rng(0)
    real = fidelity.group_sums

    def ablated(root, names):
        found = real(root, names)
        for by_group in found.values():
            noise = rng.standard_normal(len(by_group)) * 0.3
            noise -= np.average(noise, weights=by_group["scored"])
            by_group["nll_zero"] = by_group["nll_clean"] + by_group["scored"] * (cost + noise)
        return found

    monkeypatch.setattr(fidelity, "group_sums", ablated)
    found = world.collect(*world.blocks)["relu"]
    gap = found["ce_zero_gap"]
    assert gap == pytest.approx(found["ce_zero"] - found["ce_clean"]) == pytest.approx(cost)
    assert (found["ce_zero_gap_low"] > 0) is defined
    names = [f"ce_loss_recovered{end}" for end in ("", "_low", "_high")]
    assert all(np.isfinite(found[name]) is np.bool_(defined) for name in names)
    assert np.isfinite(found["ce_delta_low"])


@pytest.mark.parametrize("site", ["embed", "blocks.0.attn_out", "blocks.1.resid_pre", "blocks.1.mlp_out"])
def test_edits_that_start_below_the_site_equal_whole_passes(world, site, monkeypatch):
    """At sites before, inside and between blocks. The other tests' site is a resid_post."""
    host, block, every = world.host, world.blocks[0], [*world.blocks, tiny_block("train", 0)]
    settings = CaptureSettings((site,), "float32", 24, 0)
    for one in every:
        capture_block(host, one, world.root / site, settings)
    manifest = finish(world.root / site, [block_entry(b) for b in every], settings, host.fingerprint, 0)
    write_json(world.root / site / "manifest.json", manifest)
    task = replace(world.task, store=world.root / site, site=site, root=world.root / site / "found")
    run, starts = host.run, []

    def counted(*args, start=None, **kwargs):
        starts.append(start)
        return run(*args, start=start, **kwargs)

    monkeypatch.setattr(host, "run", counted)
    measure_block(host, block, task)
    passes = len(starts)
    assert passes % (1 + 2 + len(world.saes)) == 0, "one clean pass, two ablations, one pass of each SAE"
    assert sum(bool(start) for start in starts) == (passes * 5 // 6 if "blocks.1" in site else 0)
    whole = replace(task, root=world.root / site / "whole")
    monkeypatch.setattr(host, "run", lambda *args, start=None, **kwargs: run(*args, **kwargs))
    measure_block(host, block, whole)
    tables = [pd.read_parquet(t.root / f"{block.name}.parquet") for t in (task, whole)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-6)


def test_scores_use_the_first_sequences_and_row_metrics_use_all(world):
    task = replace(world.task, root=world.root / "part", scored_fraction=0.4)
    block = world.blocks[0]
    measure_block(world.host, block, task)
    part, whole = world.collect(block, task=task)["relu"], world.collect(block)["relu"]
    first = replace(block, input_ids=block.input_ids[:9])  # ceil(0.4 * 21)
    expected = reference(world, world.saes["relu"], first)
    assert part["n_scored_tokens"] == expected["n_scored_tokens"] < whole["n_scored_tokens"]
    assert part["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert part["fvu"] == whole["fvu"] and part["n_rows"] == whole["n_rows"]


def test_rows_are_the_stores_and_the_splice_is_of_the_models(world, tmp_path):
    """Of a store in bfloat16: row metrics are of what it holds, to the last digit; CE and KL see none of its rounding."""
    block = world.blocks[0]
    for one in (tiny_block("train", 0), block):
        capture_block(world.host, one, tmp_path / "store", CaptureSettings((SITE,), "bfloat16", 24, 0))
    write_json(tmp_path / "store/manifest.json", world.store.manifest)
    task = replace(world.task, store=tmp_path / "store", root=tmp_path / "found")
    measure_block(world.host, block, task)
    found, exact = world.collect(block, task=task)["relu"], world.collect(block)["relu"]
    for name in ("ce_clean", "ce_spliced", "ce_mean", "kl"):
        assert found[name] == exact[name], name
    x = Store(task.store).shard(SITE, block.name).float()
    x, x_hat = x.double(), world.saes["relu"](x).double()
    fvu = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert found["fvu"] == pytest.approx(fvu, rel=1e-9)
    assert found["fvu"] != pytest.approx(exact["fvu"], rel=1e-6)


@pytest.mark.parametrize("tokens_per_forward", [1, 10_000])
def test_padding_and_batching_do_not_matter(world, tokens_per_forward):
    task = replace(world.task, root=world.root / f"batch{tokens_per_forward}", tokens_per_forward=tokens_per_forward)
    for block in world.blocks:
        measure_block(world.host, block, task)
    found, expected = world.collect(*world.blocks, task=task), world.collect(*world.blocks)
    for sae_id in found:
        close(found[sae_id], expected[sae_id], 1e-4)


def test_a_block_is_done_only_when_all_of_it_is_there(world):
    root = world.root / "fresh"
    assert not done(root, world.blocks[0].name)
    facts = measure_block(world.host, world.blocks[0], replace(world.task, root=root))
    assert done(root, world.blocks[0].name)
    assert facts == {"name": world.blocks[0].name, "rows": block_entry(world.blocks[0])["rows"]}
    assert not [p for p in root.iterdir() if p.name.startswith(".")]


def test_the_model_is_left_as_it_was(world):
    ids = torch.from_numpy(world.blocks[0].input_ids[0])[None]
    before = world.host.logits(ids, None)
    measure_block(world.host, world.blocks[0], replace(world.task, root=world.root / "again"))
    assert torch.equal(world.host.logits(ids, None), before)
