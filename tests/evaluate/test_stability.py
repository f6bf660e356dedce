"""Matching over seeds on dictionaries whose answer is known, and the energy of what recurs against a plain sum."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_store
from safetensors.torch import save_file

from raysae.evaluate import stability
from raysae.evaluate.statistics import Bootstrap
from raysae.gates.criteria import judge, load_gate
from raysae.gates.metrics import METRICS
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.sae import SAE

SITE, D_IN, D_SAE = "blocks.0.resid_post", 24, 40
RNG = np.random.default_rng(3)
PLANTED = stability.directions(RNG.standard_normal((D_SAE, D_IN)).astype(np.float32))


def turned(rows: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """Unit rows, each at this cosine with the row it comes from."""
    noise = rng.standard_normal(rows.shape)
    noise -= (noise * rows).sum(1, keepdims=True) * rows
    return (cosine * rows + np.sqrt(1 - cosine**2) * stability.directions(noise)).astype(np.float32)


def test_a_permuted_dictionary_matches_itself_wholly():
    order = RNG.permutation(D_SAE)
    found = stability.match(PLANTED, PLANTED[order])
    for values in found:
        assert values == pytest.approx(np.ones(D_SAE), abs=1e-5)
    flipped = stability.match(PLANTED, -PLANTED[order])
    assert flipped.matched.max() < 0.9  # latents that are only positive tell d from -d
    assert stability.match(PLANTED, -PLANTED[order], signed=True).matched == pytest.approx(np.ones(D_SAE), abs=1e-5)


def test_matches_are_one_to_one():
    """Two rows near one of the other's: both have it as their best, only one has it as its match."""
    e = np.eye(3, dtype=np.float32)
    a = stability.directions(np.stack([e[0] + 0.1 * e[1], e[0] - 0.2 * e[1]]))
    found = stability.match(a, e[[0, 2]])
    assert found.best == pytest.approx([a[0, 0], a[1, 0]]) and found.best_back == pytest.approx([a[0, 0], 0])
    assert found.matched == pytest.approx([a[0, 0], 0]) and found.matched_back == pytest.approx([a[0, 0], 0])


def test_rows_left_over_have_no_match():
    found = stability.match(PLANTED, PLANTED[:7])
    assert (found.matched == -1).sum() == D_SAE - 7 and (found.matched_back > 0.99).all()


@pytest.mark.parametrize("signed", [False, True])
def test_wide_dictionaries_are_matched_by_mutual_nearest_neighbours(monkeypatch, signed):
    """In chunks of a few rows, against the whole matrix."""
    other = turned(PLANTED[RNG.permutation(D_SAE)][:33], 0.6, RNG)
    cosine = np.abs(PLANTED @ other.T) if signed else PLANTED @ other.T
    monkeypatch.setattr(stability, "EXACT_UP_TO", 10)
    monkeypatch.setattr(stability, "ROWS_AT_ONCE", 7)
    found = stability.match(PLANTED, other, signed)
    assert found.best == pytest.approx(cosine.max(1)) and found.best_back == pytest.approx(cosine.max(0))
    mutual = [cosine[:, cosine[i].argmax()].argmax() == i for i in range(D_SAE)]
    assert 0 < sum(mutual) < D_SAE
    assert found.matched == pytest.approx(np.where(mutual, cosine.max(1), -1))
    assert sorted(found.matched_back[found.matched_back > -1]) == pytest.approx(sorted(found.matched[mutual]))
    assert stability.method(11) != stability.method(10)


def test_the_null_crowds_where_the_decoder_does():
    """A decoder in 3 of 24 dimensions: directions like it are closer to it than directions anywhere."""
    rng = np.random.default_rng(0)
    flat = np.zeros((200, D_IN), np.float32)
    flat[:, :3] = rng.standard_normal((200, 3))
    flat = stability.directions(flat)
    like, anywhere = stability.random_directions_like(flat, rng), stability.random_directions(200, D_IN, rng)
    assert np.abs(like[:, 3:]).max() < 1e-5
    for rows in (like, anywhere):
        assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(200), abs=1e-5)
    assert stability.match(flat, like).best.mean() > 0.95 > 0.8 > stability.match(flat, anywhere).best.mean()


class World:
    """Three seeds of one configuration: half of the latents recur at 0.95, a quarter at 0.8 in seed 1 alone, the rest are
    anything; latent 0 never fires. Their dictionaries have different orders and norms."""

    recurring = np.arange(D_SAE) < D_SAE // 2

    def __init__(self, root):
        rng = np.random.default_rng(1)
        self.root = root
        x = torch.from_numpy(rng.standard_normal((300, D_IN)).astype(np.float32))
        columns = {"group": [f"g{i // 10}" for i in range(200)]}
        self.store = tiny_store(root / "store", [("train", x[:100]), ("validation", x[100:])], SITE, {1: columns})
        self.x, self.names = x[100:], self.store.names("validation")
        self.saes, rows, firings = {}, [], {}
        scale = np.float32(np.sqrt(D_IN / (1.75 * D_SAE)))  # so that x̂ is nearer to x than the mean is
        for seed in range(3):
            decoder = turned(PLANTED, 0.975, rng)  # two of these are at 0.95
            free = ~self.recurring
            decoder[free] = stability.random_directions(int(free.sum()), D_IN, rng)
            half = np.flatnonzero(free)[: D_SAE // 4]
            if seed < 2:
                decoder[half] = turned(PLANTED[half], 0.9, rng)  # two of these are at 0.8
            order = np.arange(D_SAE) if seed == 0 else rng.permutation(D_SAE)
            W_dec = torch.from_numpy(decoder[order] * rng.uniform(0.5, 2, (D_SAE, 1)).astype(np.float32) * scale)
            b_enc = torch.zeros(D_SAE)
            b_enc[np.flatnonzero(order == 0)] = -1e3
            p = {"W_enc": W_dec.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": torch.zeros(D_IN)}
            sae_id = f"relu-s{seed}"
            self.saes[sae_id] = SAE(SAEConfig("relu", D_IN, D_SAE, l1_coefficient=0.1, seed=seed), p)
            formats.save(self.saes[sae_id], root / "saes" / sae_id)
            rows.append({"sae_id": sae_id, "site": SITE, "architecture": "relu", "d_sae": D_SAE, "seed": seed})
            rows[-1] |= {"l1_coefficient": 0.1, "k": np.nan, "status": "completed"}
            firings[f"{sae_id}.firings"] = (self.saes[sae_id].encode(self.x) != 0).sum(0)
        other = {"sae_id": "alone", "site": SITE, "architecture": "topk", "d_sae": D_SAE, "seed": 0, "k": 4.0}
        self.table = pd.DataFrame([*rows, other | {"status": "completed"}])
        (root / "evaluation" / SITE).mkdir(parents=True)
        save_file(firings, root / "evaluation" / SITE / f"{self.names[0]}.safetensors")
        self.found = self.match(self.table)
        for task in stability.tasks(self.found, root / "store", root / "saes", root / "errors"):
            assert not stability.done(task.root, self.names[0])
            stability.block_errors(torch.device("cpu"), self.names[0], task)
            assert stability.done(task.root, self.names[0])
        metrics = {i: {"fvu": 0.1 + 0.01 * n, "l0": 9.0, "ce_loss_recovered": 0.9} for n, i in enumerate(self.saes)}
        self.collected = stability.collect(root / "errors", self.names, self.table, metrics, Bootstrap(200, 0.95, 0))

    def match(self, table):
        return stability.match_all(table, self.root / "saes", self.root / "evaluation", self.names, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("stability"))


def test_what_recurs_in_every_seed_is_found(world):
    (seeds,) = world.found
    first = seeds.matched["relu-s0"]  # in the planted order
    assert np.isnan(first[0]) and np.isfinite(first[1:]).all()
    assert (first[1 : D_SAE // 2] >= stability.RECURS_CLOSELY).all()
    assert (first[D_SAE // 2 :] < stability.RECURS).all()  # also those that seed 1 alone has
    assert len(seeds.pairs) == 3
    fractions = [world.collected["saes"][i]["stability_recurring_fraction"] for i in world.saes]
    assert fractions == pytest.approx([(D_SAE // 2 - 1) / (D_SAE - 1)] * 3)


def test_pairs_and_the_mean_are_of_both_directions(world):
    (entry,) = world.collected["configurations"]
    unit = {}
    for i, sae in world.saes.items():
        fired = (sae.encode(world.x) != 0).any(0)
        W = sae.parameters["W_dec"][fired]
        unit[i] = W / W.norm(dim=1, keepdim=True)
    expected = []
    for pair in entry["pairs"]:
        cosine = unit[pair["a"]] @ unit[pair["b"]].T
        one, two = cosine.amax(1).mean().item(), cosine.amax(0).mean().item()
        assert (pair["mmcs_a_in_b"], pair["mmcs_b_in_a"]) == pytest.approx((one, two), abs=1e-5)
        assert pair["mmcs"] == pytest.approx((one + two) / 2, abs=1e-5)
        expected.append((one + two) / 2)
    assert entry["mmcs"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert (entry["mmcs_least"], entry["mmcs_largest"]) == pytest.approx((min(expected), max(expected)), abs=1e-5)
    assert entry["never_fired"] == [1, 1, 1] and entry["note"] == ""
    assert entry["fvu_mean"] == pytest.approx(0.11) and entry["fvu_sd"] == pytest.approx(0.01)


def share_explained(x, sae, kept):
    """(1 - FVU of the kept latents alone) / (1 - FVU), residuals about their means, from the definition."""
    x, f, W = x.double(), sae.encode(x).double(), sae.parameters["W_dec"].double()
    total, of_all, of_kept = ((r - r.mean(0)).square().sum() for r in (x, x - f @ W, x - (f * kept) @ W))
    return ((total - of_kept) / (total - of_all)).item()


def test_the_variance_that_recurs_is_what_these_latents_explain_alone(world):
    (seeds,) = world.found
    for i, sae in world.saes.items():
        expected = share_explained(world.x, sae, torch.from_numpy(seeds.matched[i] >= stability.RECURS))
        mine = world.collected["saes"][i]
        assert mine["stability_recurring_variance"] == pytest.approx(expected, rel=1e-4)
        assert mine["stability_recurring_variance_low"] < expected < mine["stability_recurring_variance_high"]
        assert 0.2 < expected < 0.95


def test_degenerate_seeds_that_share_a_dense_mean_and_nothing_else_have_no_recurring_variance(tmp_path):
    """Activations lie about a large mean; each SAE has a latent that is it, on every row, and others of its own."""
    rng = np.random.default_rng(0)
    mean = np.zeros(D_IN, np.float32)
    mean[0] = 30
    spread = np.where(np.arange(D_IN) == 0, 0.05, 1)
    x = torch.from_numpy((spread * rng.standard_normal((400, D_IN)) + mean).astype(np.float32))
    groups = {"group": [f"g{i // 10}" for i in range(200)]}
    store = tiny_store(tmp_path / "store", [("train", x[:200]), ("validation", x[200:])], SITE, {1: groups})
    name, rows, firings = store.names("validation")[0], [], {}
    (tmp_path / "evaluation" / SITE).mkdir(parents=True)
    for seed in range(3):
        own = stability.random_directions(D_SAE, D_IN - 1, rng) * np.sqrt(D_IN / D_SAE, dtype=np.float32)
        W_dec = torch.cat([torch.zeros(D_SAE, 1), torch.from_numpy(own)], 1)
        W_dec[0] = torch.from_numpy(mean / 30)
        p = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(D_SAE), "W_dec": W_dec, "b_dec": torch.zeros(D_IN)}
        p["W_enc"][0, 1:] = 0
        sae = SAE(SAEConfig("relu", D_IN, D_SAE, l1_coefficient=0.1, seed=seed), p)
        formats.save(sae, tmp_path / "saes" / f"s{seed}")
        firings[f"s{seed}.firings"] = (sae.encode(x[200:]) != 0).sum(0)
        rows.append(
            {"sae_id": f"s{seed}", "site": SITE, "architecture": "relu", "d_sae": D_SAE, "seed": seed, "k": np.nan}
        )
    save_file(firings, tmp_path / "evaluation" / SITE / f"{name}.safetensors")
    table = pd.DataFrame(rows).assign(status="completed", l1_coefficient=0.1)
    found = stability.match_all(table, tmp_path / "saes", tmp_path / "evaluation", [name], 0)
    assert found[0].matched["s0"][0] > 0.99
    for task in stability.tasks(found, tmp_path / "store", tmp_path / "saes", tmp_path / "errors"):
        stability.block_errors(torch.device("cpu"), name, task)
    metrics = {f"s{seed}": {"fvu": 0.1, "l0": 9.0, "ce_loss_recovered": 0.9} for seed in range(3)}
    whole = stability.collect(tmp_path / "errors", [name], table, metrics, Bootstrap(100, 0.95, 0))
    for entry in whole["saes"].values():
        assert abs(entry["stability_recurring_variance"]) < 0.05
        gate = load_gate(Path(__file__).parents[2] / "configs/gates/phase4.yaml")
        judged = {v.metric: v for v in judge(gate, {**entry, "n_groups": 200, "effective_groups": 200.0})}
        assert "must be >= 0.5" in judged["stability_recurring_variance"].reason


def test_chance_is_far_below_and_stands_for_the_untrained_control(world):
    (entry,) = world.collected["configurations"]
    null = world.collected["nulls"][f"relu-{D_SAE}-{SITE}"]
    assert entry["mmcs_null"] == null["stability_mmcs"] == max(n["mmcs"] for n in entry["nulls"].values())
    assert null["stability_recurring_fraction"] == 0 < entry["recurring_fraction"]
    assert null["stability_mmcs_high"] < min(s["stability_mmcs_low"] for s in world.collected["saes"].values())
    assert null["stability_recurring_variance"] == 0


def test_every_column_that_can_gate_has_an_interval_that_holds_it(world):
    assert {m for m in METRICS if m.startswith("stability")} == {*stability.COLUMNS}
    columns = stability.columns(world.collected).set_index("sae_id")
    assert set(columns.index) == {*world.saes}  # a configuration of one seed has none
    for name in stability.COLUMNS:
        for low, value, high in zip(*(columns[f"{name}{end}"] for end in ("_low", "", "_high")), strict=True):
            assert low < value < high
    assert (columns["stability_seeds"] == 3).all()


def test_two_seeds_come_with_a_note_and_a_silent_sae_is_left_out(world, tmp_path, monkeypatch):
    (two,) = world.match(world.table[world.table["seed"] < 2])
    assert len(two.pairs) == 1 and (two.matched["relu-s0"][D_SAE // 2 : 3 * D_SAE // 4] >= stability.RECURS).all()
    shutil.copytree(world.root / "errors", tmp_path / "errors")
    stability.write_matches(tmp_path / "errors" / SITE, [two])
    metrics = {i: {"fvu": 0, "l0": 0, "ce_loss_recovered": 0} for i in world.saes}
    whole = stability.collect(tmp_path / "errors", world.names, world.table, metrics, Bootstrap(50, 0.95, 0))
    assert "3 were asked for" in whole["configurations"][0]["note"]
    fired = stability.fired
    monkeypatch.setattr(stability, "fired", lambda root, names, i: fired(root, names, i) & (i != "relu-s2"))
    (left,) = world.match(world.table)
    assert set(left.matched) == {"relu-s0", "relu-s1"}
    pruned = world.table.assign(status=["completed", "pruned", "pruned", "completed"])
    assert world.match(pruned) == []
