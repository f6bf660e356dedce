"""A store written by docs/store.md alone, with nothing of raysae: it opens, verifies, trains and is measured."""

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raysae.activations import write_store
from raysae.activations.store import ROW_COLUMNS, Store
from raysae.errors import Damaged
from raysae.evaluate.fidelity import collect
from raysae.evaluate.rows import measure_rows
from raysae.evaluate.statistics import Bootstrap
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.train import Member, Recipe
from raysae.sweep.trial import Trial, train_pack

SITE, D = "mémoire.0", 6
SPLITS = ("train", "validation", "test")
PAGE = (Path(__file__).resolve().parents[2] / "docs/store.md").read_text()


def bf16(x):
    """The upper 16 bits of float32, to nearest, ties to even."""
    bits = x.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_by_the_page(root, x, columns, per_shard, sealed):
    """x [rows, d] float32 as bfloat16."""
    stored, shards, sums = bf16(x), [], []
    for n, split in enumerate(SPLITS):
        given = np.flatnonzero(columns["split"] == split)
        order = given[np.random.default_rng([0, n]).permutation(len(given))]
        for index, start in enumerate(range(0, len(order), per_shard)):
            rows = order[start : start + per_shard]
            keys = [[columns[key][i] for i in rows] for key in ("example_id", "position")]
            keys = json.dumps([keys[0], [int(p) for p in keys[1]]], separators=(",", ":"))
            name = f"{split}-{index:05d}-{hashlib.blake2b(keys.encode(), digest_size=32).hexdigest()[:8]}"
            data = stored[rows].tobytes()
            header = {"x": {"dtype": "BF16", "shape": [len(rows), D], "data_offsets": [0, len(data)]}}
            header = json.dumps(header, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
            files = {"x": root / SITE / f"{name}.safetensors", "rows": root / "rows" / f"{name}.parquet"}
            for file in files.values():
                file.parent.mkdir(parents=True, exist_ok=True)
            files["x"].write_bytes(struct.pack("<Q", len(header)) + header + data)
            table = {
                key: pa.array([columns[key][i] for i in rows]) for key in ("example_id", "group", "split", "label")
            }
            for key, type_ in (
                ("sequence_id", "int32"),
                ("position", "int32"),
                ("token_id", "int32"),
                ("step", "int16"),
            ):
                table[key] = pa.array(columns[key][rows].astype(type_))
            pq.write_table(pa.table(table), files["rows"])
            hashes = {file.relative_to(root).as_posix(): sha256(file) for file in files.values()}
            shards.append({"name": name, "split": split, "rows": len(rows), "sha256": hashes})
            values = (stored[rows].astype("<u4") << 16).view("<f4").astype(np.float64)
            sums.append((split, len(rows), values.sum(0), np.square(values).sum()))
    train = [s for s in sums if s[0] == "train"]
    count = sum(s[1] for s in train)
    site = {
        "d_model": D,
        "mean": (sum(s[2] for s in train) / count).tolist(),
        "mean_square_norm": float(sum(s[3] for s in train) / count),
        "non_finite": 0,
    }
    manifest = {
        "schema_version": 1,
        "model": None,
        "dtype": "bfloat16",
        "sites": {SITE: site},
        "norm_outliers": 0,
        "rows": {split: sum(s["rows"] for s in shards if s["split"] == split) for split in SPLITS},
        "shards": shards,
    }
    if sealed:
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["seal"] = hashlib.sha256(text.encode()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    directions, n = rng.standard_normal((12, D)), 900
    active = rng.random((n, 12)).argsort(1) < 2
    x = ((active * (0.5 + rng.random((n, 12)))) @ directions + 0.5).astype(np.float32)
    example, position = np.divmod(np.arange(n), 3)
    columns = {
        "example_id": np.array([f"é/{e}" for e in example]),
        "group": np.array([f"g{e // 2}" for e in example]),
        "split": np.array(["train", "train", "train", "validation", "test"])[example // 2 % 5],
        "sequence_id": example,
        "position": position,
        "token_id": np.full(n, -1),
        "step": position - 1,
        "label": example % 4,
    }
    return x, columns


@pytest.mark.parametrize("sealed", [True, False])
def test_a_store_written_by_the_page_opens_trains_and_is_measured(given, tmp_path, sealed):
    x, columns = given
    write_by_the_page(tmp_path / "s", x, columns, 128, sealed)
    store = Store(tmp_path / "s")
    store.verify()
    assert store.sites == [SITE] and {split: store.rows(split) for split in SPLITS} == store.manifest["rows"]
    assert {*store.columns()} == {*ROW_COLUMNS, "label"}
    for shard in store.shards:
        for row, vector in zip(store.row_columns(shard.name).to_pylist(), store.shard(SITE, shard.name), strict=True):
            i = 3 * int(row["example_id"].removeprefix("é/")) + row["position"]
            assert vector.tolist() == torch.from_numpy(x[i]).bfloat16().tolist() and row["split"] == shard.split
    recipe = Recipe(
        steps=80, batch_size=64, warmup_steps=2, decay_steps=5, sparsity_warmup_steps=4, dead_after_tokens=999
    )
    fvu = []
    for name, label in (("plain", None), ("labelled", "label")):
        trial = Trial(store, recipe, 2, 0, tmp_path / name, {}, label=label, neighbours=label is not None)
        member = Member("it", SAEConfig("topk", D, 24, k=3, seed=0), 3e-3)
        train_pack(trial, SITE, [member], lambda rung: fvu.append(rung.metrics["it"]["fvu"]) or ())
        assert fvu[-1] < fvu[-2] < 0.9
    sae = formats.load(tmp_path / "plain/saes/it")
    names = measure_rows(store, SITE, {"it": sae}, "validation", tmp_path / "sums")
    metrics = collect(tmp_path / "sums", names, store.mean(SITE), Bootstrap(100, 0.95, 0))["it"]
    assert metrics["fvu"] == pytest.approx(fvu[1], rel=1e-4) and metrics["n_rows"] == store.rows("validation")


def test_raysae_writes_what_the_page_says(given, tmp_path):
    """Order, names and activations are the same to the byte; of rows, which Parquet may write in many ways, the content."""
    x, columns = given
    write_by_the_page(tmp_path / "page", x, columns, 128, sealed=True)
    ours = write_store(tmp_path / "ours", {SITE: x}, columns, dtype="bfloat16", seed=0, rows_per_shard=128)
    page = Store(tmp_path / "page")
    assert [s.name for s in ours.shards] == [s.name for s in page.shards]
    for shard in ours.shards:
        files = [store.path / SITE / f"{shard.name}.safetensors" for store in (ours, page)]
        assert files[0].read_bytes() == files[1].read_bytes() and load_file(files[0])["x"].shape == (shard.rows, D)
        both = [store.row_columns(shard.name, [*ROW_COLUMNS, "label"]).to_pylist() for store in (ours, page)]
        assert both[0] == both[1]
        facts = json.loads((ours.path / "shards" / f"{shard.name}.json").read_text())
        assert {*facts} == {"name", "split", "rows", "non_finite", "norm_outliers", "sha256", "sites"}
        assert {*facts["sites"][SITE]} == {"sum", "sum_squares", "d_model"} and facts["sha256"] == shard.sha256
    one, two = ({**store.manifest, "shards": None, "sites": None} for store in (ours, page))
    assert one == two
    assert [*ours.site(SITE)] == [*page.site(SITE)]
    for key, value in ours.site(SITE).items():
        assert value == pytest.approx(page.site(SITE)[key], rel=1e-12), key
    assert {*(p.name for p in ours.path.iterdir())} == {"manifest.json", SITE, "rows", "shards"}


def test_every_key_of_a_manifest_is_on_the_page(given, tmp_path):
    x, columns = given
    store = write_store(tmp_path / "ours", {SITE: x}, columns)
    named = {*re.findall(r"`([\w.*]+)`", PAGE)}
    keys = {*json.loads((store.path / "manifest.json").read_text())}
    assert {*keys, *(f"sites.*.{key}" for key in store.site(SITE)), *ROW_COLUMNS} <= named


def test_a_manifest_that_does_not_match_its_seal_is_refused(given, tmp_path):
    write_by_the_page(tmp_path, *given, 128, sealed=True)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"norm_outliers": 0', '"norm_outliers": 1'))
    with pytest.raises(Damaged, match=r"manifest\.json: does not match its own hash"):
        Store(tmp_path)
