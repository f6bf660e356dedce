"""Row metrics from a store alone are those that a model host measures on the way, and nothing is invented beside them."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import D_MODEL, block_entry, sparse_rows, tiny_block, tiny_host

from raysae.activations import write_store
from raysae.activations.capture import CaptureSettings, capture_block, finish
from raysae.activations.source import Subset
from raysae.activations.store import Store
from raysae.errors import UserError
from raysae.evaluate import rows as row_metrics
from raysae.evaluate.fidelity import OF_SCORES, SCORE_SUMS, Measurement, Paired, collect, measure_block
from raysae.evaluate.rows import ROW_SUMS, done, measure_rows
from raysae.evaluate.statistics import Bootstrap
from raysae.files import write_json
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig, initial_parameters
from raysae.sae.sae import SAE

SITE = "blocks.0.resid_post"
BOOTSTRAP = Bootstrap(200, 0.95, 0)


def saes():
    configs = {
        "relu": SAEConfig("relu", D_MODEL, 24, l1_coefficient=0.1, seed=1),
        "topk": SAEConfig("topk", D_MODEL, 24, k=5, seed=2),
    }
    return {i: SAE(c, initial_parameters(c, torch.full((D_MODEL,), 0.3))) for i, c in configs.items()}


@pytest.mark.parametrize("scored", [1.0, 0.0])
def test_a_store_alone_gives_the_row_metrics_that_a_model_host_gives(tmp_path, scored):
    host = tiny_host()
    blocks = [tiny_block("train", 0), *(tiny_block("validation", i, examples=21, groups=12) for i in (0, 1))]
    settings = CaptureSettings((SITE,), "bfloat16", 24, 0)
    for block in blocks:
        capture_block(host, block, tmp_path / "store", settings)
    manifest = finish(tmp_path / "store", [block_entry(b) for b in blocks], settings, host.fingerprint, 0)
    write_json(tmp_path / "store/manifest.json", manifest)
    store, paths = Store(tmp_path / "store"), []
    for sae_id, sae in saes().items():
        formats.save(sae, tmp_path / "saes" / sae_id)
        paths.append((sae_id, tmp_path / "saes" / sae_id))
    task = Measurement(store.path, SITE, tuple(paths), tmp_path / "hosted", 24, scored)
    for block in blocks[1:]:
        measure_block(host, block, task)
    names = [block.name for block in blocks[1:]]
    hosted = collect(task.root, names, store.mean(SITE), BOOTSTRAP)
    loaded = {sae_id: formats.load(path) for sae_id, path in paths}
    assert measure_rows(store, SITE, loaded, "validation", tmp_path / "alone") == names
    alone = collect(tmp_path / "alone", names, store.mean(SITE), BOOTSTRAP)
    assert [*alone] == [*hosted] == ["relu", "topk"]
    for sae_id, found in alone.items():
        assert {"fvu", "fvu_low", "l0", "never_fired_fraction", "effective_latents", "n_groups"} <= {*found}
        for name, value in found.items():
            assert value == pytest.approx(hosted[sae_id][name], rel=1e-12, nan_ok=True), name
        rest = {name.removesuffix("_low").removesuffix("_high") for name in {*hosted[sae_id]} - {*found}}
        of_model = {"ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl_zero", "kl_mean", "n_scored_tokens"}
        assert rest == {*OF_SCORES, *of_model, "n_scored_groups", "effective_scored_groups"}, "absent, not invented"
    pairs = [Paired.read([r], names, m, BOOTSTRAP) for r, m in ((task.root, hosted), (tmp_path / "alone", alone))]
    apart = [paired.difference("relu", "topk", lambda m: m.fvu) for paired in pairs]
    assert apart[0] == pytest.approx(apart[1], rel=1e-12) and apart[0] is not None
    facts = [sorted(p.name for p in root.iterdir()) for root in (task.root, tmp_path / "alone")]
    assert facts[0] == facts[1]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Rows of examples of three positions, of which the last has no part in what the others share."""
    x = sparse_rows(900, D_MODEL, seed=2)
    x[2::3] = torch.randn(300, D_MODEL, generator=torch.Generator().manual_seed(0)) * 3
    example = np.arange(900) // 3
    columns = {
        "example_id": [f"e{e}" for e in example],
        "group": [f"g{e // 2}" for e in example],
        "split": np.array(["train", "validation"])[example // 2 % 2],
    }
    return write_store(tmp_path_factory.mktemp("vectors") / "s", {"v": x}, columns, rows_per_shard=128)


def test_metrics_of_any_vectors_are_those_of_the_definitions(vectors, tmp_path):
    names = measure_rows(vectors, "v", saes(), "validation", tmp_path)
    found = collect(tmp_path, names, vectors.mean("v"), BOOTSTRAP)
    x = vectors.head("v", "validation", 10**6)
    for sae_id, sae in saes().items():
        f = sae.encode(x)
        error = (x - sae.decode(f)).double().square().sum()
        fvu = error / (x.double() - x.double().mean(0)).square().sum()
        metrics = found[sae_id]
        assert metrics["fvu"] == pytest.approx(fvu.item(), rel=1e-6)
        assert metrics["l0"] == pytest.approx((f != 0).sum(1).double().mean().item())
        assert metrics["never_fired_fraction"] == (f == 0).all(0).double().mean().item()
        assert metrics["n_rows"] == 450 and metrics["n_groups"] == 75
        assert metrics["fvu_low"] < metrics["fvu"] < metrics["fvu_high"]
        assert not any(math.isnan(v) for name, v in metrics.items() if not name.startswith("fvu_top_norms"))
    table = pd.read_parquet(tmp_path / f"{names[0]}.parquet")
    assert {*table} == {"group", "sae_id", *ROW_SUMS} and not {*table} & {*SCORE_SUMS}


def test_a_subset_is_measured_on_its_own_rows_about_its_own_mean(vectors, tmp_path):
    found = {}
    for position in (0, 2):
        part = Subset(vectors, "position", position)
        names = measure_rows(part, "v", saes(), "validation", tmp_path / str(position))
        found[position] = collect(tmp_path / str(position), names, part.mean("v"), BOOTSTRAP)["topk"]
        x = part.head("v", "validation", 10**6)
        x_hat, _ = saes()["topk"].reconstruct(x)
        fvu = (x - x_hat).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
        assert found[position]["fvu"] == pytest.approx(fvu.item(), rel=1e-6) and found[position]["n_rows"] == 150
        assert row_metrics.usual_rows(part, "v").mean == pytest.approx(part.mean("v"), abs=0.5)
    limits = [row_metrics.usual_rows(s, "v").limit for s in (vectors, Subset(vectors, "position", 0))]
    assert limits[0] > 1.2 * limits[1], "which norms are usual is asked of the subset"


def test_shards_that_were_measured_are_not_measured_again(vectors, tmp_path, monkeypatch):
    measured, real = [], row_metrics.row_sums
    monkeypatch.setattr(row_metrics, "row_sums", lambda *args: measured.append(args[-1]) or real(*args))
    names = measure_rows(vectors, "v", saes(), "validation", tmp_path)
    assert measured == names and all(done(tmp_path, name) for name in names)
    (tmp_path / f"{names[1]}.json").unlink()
    assert measure_rows(vectors, "v", saes(), "validation", tmp_path) == names and measured == [*names, names[1]]
    with pytest.raises(UserError, match=r"has no test rows$"):
        measure_rows(vectors, "v", saes(), "test", tmp_path)
