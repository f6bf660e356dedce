"""Nulls: that each lacks what it is meant to lack, has what it is meant to have, and that none is a straw man."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import sparse_rows, tiny_store

from raysae.activations.store import Store
from raysae.config import sections as config
from raysae.evaluate import nulls
from raysae.evaluate.nulls import Peer, beside, build, compared, fitted, ica, pca, permuted, scaled
from raysae.sae import formats
from raysae.sae.architectures import ARCHITECTURES, SAEConfig, initial_parameters
from raysae.sae.losses import Losses
from raysae.sae.metrics import RowSums
from raysae.sae.sae import SAE
from raysae.sae.train import Member, Recipe, untrained
from raysae.sweep.trial import Trial, input_scale, train_pack, unpaired

D, SITE = 8, "blocks.0.resid_post"
RECIPE = Recipe(
    steps=400, batch_size=64, warmup_steps=20, decay_steps=80, sparsity_warmup_steps=4, dead_after_tokens=4096
)
METADATA = {"model_name": "toy", "context_size": 16, "hook_name": "blocks.0.hook_resid_post"}


def made(kind: str, peer: Peer, store: Store, seed: int):
    return nulls._Maker(store, seed).make(kind, peer)


def on_site(trial: Trial, packs: dict) -> None:
    for site, pack in packs.items():
        train_pack(trial, site, pack, lambda rung: [])


def measure(sae, x):
    f, sums = sae.encode(x), RowSums(x.double().mean(0))
    sums.add(x, sae.decode(f), f)
    return sums.metrics()


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return sparse_rows(500, D, seed=2)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    shards = [("train", sparse_rows(1500, D, seed=1)), ("validation", sparse_rows(500, D, seed=2))]
    store = tiny_store(root / "store", shards, SITE)
    return Trial(store, RECIPE, rungs=1, stream_seed=5, root=root / "sweep", metadata=METADATA)


@pytest.fixture(scope="module")
def peers(trial):
    """A trained TopK and a trained ReLU SAE."""
    members = [
        Member("topk", SAEConfig("topk", D, 24, k=2, seed=1), 1e-2),
        Member("relu", SAEConfig("relu", D, 20, l1_coefficient=0.05, seed=2), 1e-2),
    ]
    train_pack(trial, SITE, members, lambda rung: [])
    x = sparse_rows(500, D, seed=2)
    saes = {m.sae_id: formats.load(trial.root / "saes" / m.sae_id) for m in members}
    return [Peer(i, SITE, sae, measure(sae, x)["l0"], 1e-2) for i, sae in saes.items()]


# ----------------------------------------------------------------------------------------------------------------------
# All of them


def test_every_kind_of_the_config_is_made_and_stands_beside_each_sae(trial, peers, tmp_path):
    facts = build(tmp_path, config.NULLS, peers, trial, Losses(), 0, on_site)
    assert set(config.NULLS) == set(get_args(config.Null)) and all("-" not in kind for kind in config.NULLS)
    assert all(f"\n{kind}" in nulls.__doc__ or f", {kind}" in nulls.__doc__ for kind in config.NULLS)
    for kind in config.NULLS:
        stands = [i for f in facts.values() if f["kind"] == kind for i in f["beside"]]
        assert sorted(stands) == sorted(p.sae_id for p in peers), kind
    for name, found in facts.items():
        sae = formats.load(tmp_path / "saes" / name)
        assert found["made"] and name.startswith(f"control-{found['kind']}-")
        assert (sae.config.d_in, sae.config.d_sae) == (D, found["d_sae"])
        assert found["expansion_factor"] == found["d_sae"] / D
        assert sae.metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert beside(facts, "untrained_model", SITE, "relu") == f"control-untrained_model-relu-20-{SITE}"
    assert beside(facts, "pca", SITE, "gated") is None and beside(facts, "pca", "final_norm", "relu") is None


def test_nulls_stand_beside_every_sae_at_its_size_and_l0_and_equal_ones_are_shared(trial, peers, tmp_path, monkeypatch):
    relu, topk = peers[1], peers[0]
    several = [
        topk, topk._replace(sae_id="twin", l0=1.3, median=False), topk._replace(sae_id="denser", l0=2.4, median=False),
        relu._replace(l0=2.0), topk._replace(sae_id="wide", sae=wider(topk.sae, 40), median=False),
    ]  # fmt: skip
    kinds = ["untrained", "random_encoder", "pca", "shuffled_rows", "permuted"]
    facts = build(tmp_path, kinds, iter(several), trial, Losses(), 0, on_site)
    stands = {name: f["beside"] for name, f in facts.items()}
    assert {name: ids for name, ids in stands.items() if "random_encoder" in name} == {
        f"control-random_encoder-topk-24-k2-{SITE}": ["topk", "twin"],
        f"control-random_encoder-topk-24-k3-{SITE}": ["denser"],
        f"control-random_encoder-topk-20-k2-{SITE}": ["relu"],
        f"control-random_encoder-topk-40-k2-{SITE}": ["wide"],
    }
    assert stands[f"control-untrained-relu-20-k2-{SITE}"] == ["relu"]
    assert stands[f"control-pca-8-k2-{SITE}"] == ["topk", "twin", "relu", "wide"]
    assert facts[f"control-pca-8-k2-{SITE}"]["latents"] == 40 and facts[f"control-pca-8-k2-{SITE}"]["d_sae"] == 8
    assert [ids for name, ids in stands.items() if "permuted" in name] == [[p.sae_id] for p in several]
    assert {i for name, ids in stands.items() if "shuffled_rows" in name for i in ids} == {"topk", "relu"}
    x = sparse_rows(500, D, seed=2)
    for name, f in facts.items():
        if "k" in f:
            l0 = measure(formats.load(tmp_path / "saes" / name), x)["l0"]
            assert l0 == pytest.approx(f["k"], abs=0.05), name
    monkeypatch.setattr(nulls._Maker, "make", None)  # a stage that was killed makes no null again
    again = build(tmp_path, kinds, iter(several), trial, Losses(), 0, on_site)
    assert again == facts


def wider(sae, d_sae):
    c = replace(sae.config, d_sae=d_sae)
    return SAE(c, initial_parameters(c, torch.zeros(D)), sae.metadata)


def test_what_trains_trains_as_one_pack_per_site_and_only_what_is_missing(trial, peers, tmp_path):
    seen = []

    def spy(given, packs):
        seen.append((given.shuffled, given.recipe, given.root, {s: [m.sae_id for m in p] for s, p in packs.items()}))
        for site, pack in packs.items():
            train_pack(given, site, pack[:1] if len(seen) == 1 else pack, lambda rung: [])  # killed half-way at first

    build(tmp_path, ["shuffled_rows"], peers, trial, Losses(), 0, spy)
    facts = build(tmp_path, ["shuffled_rows", "untrained_model"], peers, trial, Losses(), 0, spy)
    names = {kind: [f"control-{kind}-topk-24-{SITE}", f"control-{kind}-relu-20-{SITE}"] for kind in nulls.TRAINED}
    assert seen == [
        (True, RECIPE, tmp_path, {SITE: names["shuffled_rows"]}),
        (True, RECIPE, tmp_path, {SITE: names["shuffled_rows"][1:]}),
        (False, RECIPE, tmp_path, {SITE: names["untrained_model"]}),
    ]
    assert all(found["made"] for found in facts.values())
    # On the store of the compared SAE, what is trained as it was is what it is.
    for peer, name in zip(peers, names["untrained_model"], strict=True):
        again = formats.load(tmp_path / "saes" / name)
        assert all(torch.equal(again.parameters[k], p) for k, p in peer.sae.parameters.items())


def test_a_training_that_diverged_is_not_made(trial, peers, tmp_path):
    wild = [peers[1]._replace(learning_rate=1e25)]
    (found,) = build(tmp_path, ["shuffled_rows"], wild, trial, Losses(), 0, on_site).values()
    assert not found["made"]
    assert beside({"x": found}, "shuffled_rows", SITE, "relu") is None


def test_the_random_sae_of_probes_and_features_is_another_start_in_the_same_place(trial, peers):
    store = trial.source
    for peer in peers:
        start, other = untrained(peer.sae.config, input_scale(store, SITE)), nulls.random_sae(peer.sae, store, SITE, 0)
        assert other.config == replace(start.config, seed=peer.sae.config.seed + 1)
        assert torch.equal(other.parameters["b_dec"], start.parameters["b_dec"])
        cosines = torch.cosine_similarity(other.parameters["W_dec"], start.parameters["W_dec"], dim=1)
        assert cosines.abs().mean() < 0.5
        assert torch.equal(nulls.random_sae(peer.sae, store, SITE, 0).parameters["W_enc"], other.parameters["W_enc"])


def test_the_widest_with_the_median_coefficient_is_compared():
    def row(sae_id, architecture, d_sae, value, seed=0, status="completed", site="s"):
        knob = "k" if architecture == "topk" else "l1_coefficient"
        values = {"k": np.nan, "l1_coefficient": np.nan, knob: value}
        return {"sae_id": sae_id, "site": site, "architecture": architecture, "d_sae": d_sae, "seed": seed,
                "status": status, **values}  # fmt: skip

    table = pd.DataFrame(
        [
            *(row(f"k{k}-s{s}", "topk", 64, k, s) for k in (4, 32, 8, 16) for s in (1, 0)),
            *(row(f"narrow{k}", "topk", 32, k) for k in (64, 128)), row("gone", "topk", 128, 8, status="pruned"),
            row("there", "topk", 8, 2, site="t"),
            *(row(f"l{c}", "relu", 64, c) for c in (0.1, 0.5, 0.2)),
        ]
    )  # fmt: skip
    assert set(compared(table)["sae_id"]) == {"k8-s0", "l0.2", "there"}
    assert len(compared(table.head(0))) == 0


# ----------------------------------------------------------------------------------------------------------------------
# One by one


def test_untrained_is_the_compared_sae_before_its_first_step_with_its_best_scale(trial, peers, real):
    store = trial.source
    null, facts = made("untrained", peers[0], store, 0)
    assert facts == {"k": 2, "fitted_rows": 1500}
    none = replace(trial, recipe=replace(RECIPE, steps=1, warmup_steps=10**9), root=trial.root / "none")
    train_pack(none, SITE, [Member("start", peers[0].sae.config, 1e-2)], lambda rung: [])  # a step of no length
    start = formats.load(none.root / "saes" / "start")
    torch.testing.assert_close(null.encode(real), start.encode(real), atol=1e-4, rtol=1e-4)
    ratio = null.parameters["W_dec"] / start.parameters["W_dec"]
    assert (ratio - ratio[0, 0]).abs().max() < 1e-3
    x = store.head(SITE, "train", 1500)
    best = measure(null, x)["fvu"]
    for factor, moved in ((1.02, 0.0), (0.98, 0.0), (1.0, 0.02)):
        p = null.parameters
        other = nulls._decoded(null, p["W_dec"] * factor, p["b_dec"] + moved)
        torch.testing.assert_close(other.encode(x), null.encode(x), atol=1e-4, rtol=1e-4)
        assert measure(other, x)["fvu"] > best
    assert best < 0.8 * measure(start, x)["fvu"]


def random_encoder_by_hand(null, x):
    """W_dec and b_dec of the best decoder for an SAE's latents, by a dense solve with an intercept."""
    f = null.encode(x).double().numpy()
    columns = np.concatenate([f, np.ones((len(f), 1))], axis=1)
    return np.linalg.lstsq(columns, x.double().numpy(), rcond=None)[0]


@pytest.mark.parametrize("gram", [4096, 0])
def test_a_random_encoder_has_the_best_decoder_for_it(trial, peers, real, monkeypatch, gram):
    """As a dense least-squares solve has it; by its Gram matrix, or over the rows at every step."""
    monkeypatch.setattr(nulls, "GRAM_AT_MOST", gram)
    monkeypatch.setattr(nulls, "RIDGE", 1e-7)
    store = trial.source
    null, facts = made("random_encoder", peers[0], store, 0)
    assert facts == {"k": 2, "fitted_rows": 1500} and null.config.k == 2 and null.config.d_sae == 24
    x = store.head(SITE, "train", 1500)
    by_hand = random_encoder_by_hand(null, x)
    best = ((x.double() - (np.c_[null.encode(x).double(), np.ones(1500)] @ by_hand)).square().sum()).item()
    found = (x.double() - null(x).double()).square().sum().item()
    assert found == pytest.approx(best, rel=1e-3)
    start, _ = made("untrained", peers[0], store, 0)
    assert not torch.equal(null.encode(real) != 0, start.encode(real) != 0), "of another seed than the SAE's"
    assert measure(peers[0].sae, real)["fvu"] < measure(null, real)["fvu"] < measure(start, real)["fvu"]


def test_a_fitted_decoder_leaves_out_what_never_fires_and_keeps_what_a_latent_reads():
    x = torch.cat([torch.eye(D), -torch.eye(D)]).repeat(20, 1) * torch.linspace(0.5, 2, 16 * 20)[:, None] + 3
    config = SAEConfig("topk", D, 24, k=1)
    eye = torch.eye(D)
    parts = {"W_enc": torch.cat([eye, -eye, torch.zeros(D, 8)], 1), "b_enc": torch.tensor([0.0] * 16 + [-9.0] * 8)}
    sae = SAE(config, parts | {"W_dec": torch.ones(24, D), "b_dec": torch.full((D,), 3.0)})
    best = fitted(sae, x)
    assert (best.parameters["W_dec"][16:] == 0).all() and measure(best, x)["fvu"] < 1e-5
    torch.testing.assert_close(best.encode(x), sae.encode(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_decoder_changes_no_latent(architecture):
    config = SAEConfig(architecture, D, 24, **{ARCHITECTURES[architecture].coefficient: 3})
    sae = SAE(config, initial_parameters(config, torch.zeros(D)))
    p = {
        n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for n, t in sae.parameters.items()
    }
    sae, x = SAE(config, p), sparse_rows(200, D, seed=1)
    torch.testing.assert_close(scaled(sae, x).encode(x), sae.encode(x), atol=1e-4, rtol=1e-4)
    assert measure(scaled(sae, x), x)["fvu"] <= min(1.0, measure(sae, x)["fvu"]) + 1e-6, "no worse than the mean alone"


def test_permuted_latents_fire_as_before_and_none_keeps_its_row(peers, real):
    for peer in peers:
        null = permuted(peer.sae, seed=3)
        assert torch.equal(null.encode(real), peer.sae.encode(real))
        before, after = peer.sae.parameters["W_dec"], null.parameters["W_dec"]
        same = torch.cdist(before, after) == 0  # [old row, new row]
        assert same.sum(0).eq(1).all() and same.sum(1).eq(1).all() and not same.diagonal().any()
        assert measure(null, real)["fvu"] > 2 * measure(peer.sae, real)["fvu"]
        assert torch.equal(permuted(peer.sae, 3).parameters["W_dec"], after)
        assert not torch.equal(permuted(peer.sae, 4).parameters["W_dec"], after)


def test_pca_keeps_each_row_s_largest_scores_of_either_sign(trial, peers, real, tmp_path):
    store, peer = trial.source, peers[0]._replace(l0=2.4)
    null, _ = made("pca", peer, store, 0)
    x = store.head(SITE, "train", 10**9).double().numpy()
    axes = np.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    scores = (real.double().numpy() - x.mean(0)) @ axes.T
    kept = np.abs(scores) >= np.sort(np.abs(scores), axis=1)[:, [-3]]  # L0 2.4 is rounded up
    by_hand = (scores * kept) @ axes + x.mean(0)
    formats.save(null, tmp_path / "pca")
    read = formats.load(tmp_path / "pca")
    np.testing.assert_allclose(read.decode(read.encode(real)).numpy(), by_hand, atol=1e-4)
    assert measure(read, real)["l0"] == 3 and (read.encode(real) < 0).any()


def test_a_linear_code_as_dense_as_its_axes_loses_nothing(trial, peers, real):
    for kind in ("pca", "ica"):
        null, _ = made(kind, peers[0]._replace(l0=50.0), trial.source, 0)
        assert null.config.d_sae == D and measure(null, real)["l0"] == D
        assert measure(null, real)["fvu"] < 1e-6
    narrow = peers[0]._replace(sae=wider(peers[0].sae, 5))
    assert made("pca", narrow, trial.source, 0)[0].config.d_sae == 5, "never wider than the compared SAE"


def test_ica_finds_independent_sources_that_pca_does_not():
    """Sparse sources along skew directions of unequal lengths: one latent per row is enough, if it is the right one."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(D, D)) * np.geomspace(0.5, 2, D)[:, None]
    sources = np.eye(D)[rng.integers(0, D, 4000)] * rng.choice([-1, 1], 4000)[:, None]
    x = torch.from_numpy(sources @ directions + 3).float()
    config = SAEConfig("abstopk", D, D, k=1)
    independent, converged = ica(x, config)
    principal, _ = pca(x, config)
    assert converged and measure(independent, x)["fvu"] < 0.05 < 0.2 < measure(principal, x)["fvu"]
    norms = independent.parameters["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(D))  # so that the largest latent is the one that contributes most


def test_ica_says_when_it_did_not_converge_and_leaves_out_empty_dimensions(monkeypatch):
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(0))
    x[:, 5:] = 1.0
    code, _ = ica(x, SAEConfig("abstopk", D, D, k=1))
    assert code.config.d_sae == 5 and all(p.isfinite().all() for p in code.parameters.values())
    monkeypatch.setattr(nulls, "ICA_STEPS", 1)
    monkeypatch.setattr(nulls, "ICA_TOLERANCE", 1e-12)
    assert ica(x, SAEConfig("abstopk", D, D, k=1))[1] is False


def test_shuffled_rows_keep_each_dimension_s_values_and_no_two_of_a_row_together():
    x = sparse_rows(400, D, seed=3)
    mixed = unpaired(x, (1, 2))
    assert torch.equal(mixed.sort(0).values, x.sort(0).values)
    assert torch.corrcoef(x.T).triu(1).abs().max() > 0.3 > 0.2 > torch.corrcoef(mixed.T).triu(1).abs().max()
    came_from = [(x[:, j] == mixed[:, j, None]).float().argmax(1) for j in range(D)]  # of each value, its old row
    pairs = torch.stack(came_from)
    assert all((pairs[i] != pairs[j]).all() for i in range(D) for j in range(i))
    assert (pairs - torch.arange(400)).unique(dim=1).shape[1] > 300, "rows come in another order, not only rolled"
    assert torch.equal(mixed, unpaired(x, (1, 2))) and not torch.equal(mixed, unpaired(x, (1, 3)))
    wide = torch.arange(60.0).view(3, 20)
    assert torch.equal(unpaired(wide, (0, 0)).sort(0).values, wide)


def test_an_sae_of_shuffled_rows_is_worse_on_real_ones(trial, peers, real, tmp_path):
    (name,) = build(tmp_path, ["shuffled_rows"], peers[:1], trial, Losses(), 0, on_site)
    null, trained = measure(formats.load(tmp_path / "saes" / name), real), measure(peers[0].sae, real)
    assert null["fvu"] > 1.3 * trained["fvu"] and null["l0"] == pytest.approx(trained["l0"], abs=0.05)
