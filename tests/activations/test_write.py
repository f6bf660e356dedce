"""A store of any vectors: every row once, with its columns, in random order, with the moments of what is stored."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from helpers import sparse_rows

from raysae.activations import write_store
from raysae.activations.store import ROW_COLUMNS, Store
from raysae.errors import UserError
from raysae.files import read_sealed
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.train import Member, Recipe
from raysae.sweep.trial import Trial, train_pack

ROWS, D = 300, 6
SPLIT_OF = np.array(["train", "train", "train", "validation", "test"])


def columns(rows=ROWS):
    """Examples of three rows each, two examples to a group, a label, splits by group."""
    example = np.arange(rows) // 3
    group = example // 2
    return {
        "example_id": [f"e{i}" for i in example],
        "group": [f"g{i}" for i in group],
        "split": SPLIT_OF[group % 5],
        "phase": example % 4,
        "kind": [f"k{i % 3}" for i in example],
    }


def numbered(rows=ROWS, d=D):
    """Rows that say which they are."""
    return np.arange(rows, dtype=np.float32)[:, None] + np.linspace(0, 0.5, d, dtype=np.float32)


def written(path, vectors=None, given=None, **settings):
    settings = {"dtype": "float32", "seed": 0, "rows_per_shard": 64, **settings}
    return write_store(
        path, {"here": numbered()} if vectors is None else vectors, columns() if given is None else given, **settings
    )


def rows_of(store, site="here"):
    """By row number: its columns, shard and x, over all shards."""
    found = {}
    for shard in store.shards:
        x = store.shard(site, shard.name)
        table = store.row_columns(shard.name, [*ROW_COLUMNS, "phase", "kind"]).to_pylist()
        for vector, row in zip(x, table, strict=True):
            assert round(float(vector[0])) not in found
            found[round(float(vector[0]))] = (row, shard, vector)
    return found


def test_every_row_lies_once_in_its_split_with_its_columns(tmp_path):
    store, given = written(tmp_path / "s"), columns()
    found = rows_of(store)
    assert sorted(found) == list(range(ROWS))
    for i, (row, shard, vector) in found.items():
        assert vector.tolist() == numbered()[i].tolist()
        assert {name: row[name] for name in given} == {name: given[name][i] for name in given}
        assert row["split"] == shard.split and shard.name.startswith(f"{shard.split}-0000")
        assert (row["position"], row["sequence_id"], row["token_id"], row["step"]) == (i % 3, i // 3, -1, -1)
    assert [s.rows for s in store.shards] == [64, 64, 52, 60, 60]
    assert store.manifest["rows"] == {"train": 180, "validation": 60, "test": 60} and store.manifest["model"] is None
    assert len({s.name for s in store.shards}) == 5
    store.verify()
    assert read_sealed(store.path / "manifest.json")["rows"] == store.manifest["rows"]
    assert not [p for p in tmp_path.rglob("*.tmp")]


def test_rows_are_permuted_over_all_shards_of_a_split_by_the_seed(tmp_path):
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        store = written(tmp_path / name, seed=seed)
        orders.append([int(x) for x in store.head("here", "train", ROWS)[:, 0]])
    assert orders[0] == orders[1] != orders[2]
    first = np.array(orders[0][:64])
    assert (np.diff(np.sort(first)) > 3).any() and np.mean(np.diff(first) == 1) < 0.1
    assert abs(first.mean() - np.mean(orders[0])) < 3 * np.std(orders[0]) / 8, "shards are no runs of the input"
    names = [[p.relative_to(tmp_path / n) for p in sorted((tmp_path / n).rglob("*"))] for n in "ab"]
    assert names[0] == names[1]
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in names[0] if p.suffix)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_blocks_give_the_bytes_of_one_array_in_every_dtype(tmp_path, dtype):
    x, other = sparse_rows(ROWS, D, seed=3), torch.randn(ROWS, 3, dtype=torch.float64)
    one = written(tmp_path / "one", {"a": x, "b": other.numpy()}, dtype=dtype)
    blocks = {"a": (x[i : i + 70] for i in range(0, ROWS, 70)), "b": iter([other[:1], other[1:].numpy()])}
    two = written(tmp_path / "two", blocks, dtype=dtype)
    assert one.manifest == two.manifest and one.d_model("b") == 3
    assert one.shard("a", one.names("test")[0]).dtype == getattr(torch, dtype)


def test_moments_are_of_the_stored_training_rows_alone(tmp_path):
    store = written(tmp_path / "s", {"a": sparse_rows(ROWS, D, seed=3)}, dtype="bfloat16")
    x = store.head("a", "train", ROWS).double()
    np.testing.assert_allclose(store.mean("a").numpy(), x.mean(0), rtol=1e-12)
    assert store.site("a")["mean_square_norm"] == pytest.approx(x.square().sum(1).mean().item(), rel=1e-12)
    assert store.site("a")["non_finite"] == store.manifest["norm_outliers"] == 0
    held_out = columns() | {"split": ["test"] * ROWS}
    store = written(tmp_path / "t", given=held_out)
    np.testing.assert_allclose(store.mean("here").numpy(), numbered().astype(np.float64).mean(0), rtol=1e-6)


def test_tables_and_frames_are_columns_too_and_given_ones_are_kept(tmp_path):
    given = columns() | {
        "position": [2 * (i % 3) for i in range(ROWS)],
        "token_id": np.arange(ROWS),
        "step": np.arange(ROWS) % 7 - 1,
    }
    frame = pd.DataFrame(given, index=np.arange(ROWS)[::-1])
    stores = [written(tmp_path / str(i), given=table) for i, table in enumerate((pa.table(given), frame))]
    assert stores[0].manifest == stores[1].manifest
    for i, (row, _, _) in rows_of(stores[1]).items():
        assert (row["position"], row["token_id"], row["step"]) == (2 * (i % 3), i, i % 7 - 1)
    assert stores[1].label_count("train", "phase") == 4


def test_facts_are_keys_of_the_manifest(tmp_path):
    store = written(tmp_path / "s", facts={"system": {"name": "toy", "features": 3}})
    assert Store(store.path).manifest["system"] == {"name": "toy", "features": 3}
    with pytest.raises(UserError, match=r"facts: rows, sites: the manifest's own"):
        written(tmp_path / "t", facts={"sites": 1, "rows": 2})


def test_an_sae_trains_on_a_store_of_vectors(tmp_path):
    x = sparse_rows(3000, 8, seed=1)
    store = written(tmp_path / "s", {"here": x}, columns(3000))
    recipe = Recipe(
        steps=60, batch_size=64, warmup_steps=2, decay_steps=5, sparsity_warmup_steps=4, dead_after_tokens=999
    )
    trial = Trial(store, recipe, 2, 0, tmp_path / "sweep", {"model_name": None})
    rungs = []
    member = Member("one", SAEConfig("topk", 8, 32, k=4, seed=1), 3e-3)
    for each in (trial, replace(trial, label="phase", neighbours=True, root=tmp_path / "by label")):
        train_pack(each, "here", [member], lambda rung: rungs.append(rung.metrics["one"]["fvu"]) or ())
        assert rungs[-1] < rungs[-2] < 0.9
        assert formats.load(each.root / "saes/one").config.d_sae == 32


def test_a_store_of_vectors_is_of_no_model(tmp_path):
    with pytest.raises(UserError, match=r"was made with vectors of no model"):
        written(tmp_path / "s").check_model({"name": "gpt2", "class": "GPT2", "weights": "abc"})


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def with_nan(at=17):
    x = numbered()
    x[at, 2] = np.nan
    return x


def split_group(given):
    return given | {"split": ["test", *given["split"][1:]]}


WRONG = {
    "nan": (lambda v, c: ({"here": with_nan()}, c), r"vectors\.here: row 17 holds NaN or inf in float32"),
    "rows": (lambda v, c: ({"here": v[:-1]}, c), r"vectors\.here: 299 rows, columns have 300"),
    "few blocks": (lambda v, c: ({"here": iter([v[:9]])}, c), r"vectors\.here: 9 rows, columns have 300"),
    "many blocks": (lambda v, c: ({"here": iter([v, v])}, c), r"vectors\.here: 600 rows, columns have 300"),
    "no blocks": (lambda v, c: ({"here": iter([])}, c), r"vectors\.here: 0 rows, columns have 300"),
    "widths": (lambda v, c: ({"here": [v[:9], v[9:, :2]]}, c), r"a block of 2 dimensions after one of 6"),
    "one dimension": (lambda v, c: ({"here": v[:, 0]}, c), r"vectors\.here: an array of shape \[300\], not \[rows, d\]"),
    "no site": (lambda v, c: ({}, c), r"vectors: there are no sites"),
    "own folder": (lambda v, c: ({"rows": v}, c), r"vectors: 'rows' has the same folder as"),
    "manifest": (lambda v, c: ({"Manifest.json": v}, c), r"vectors: 'Manifest.json' has the same folder as"),
    "same folder": (lambda v, c: ({"a": v, "A": v}, c), r"vectors: 'A' has the same folder as 'a'"),
    "path": (lambda v, c: ({"../a": v}, c), r"vectors: '\.\./a' is not the name of a folder"),
    "no split": (lambda v, c: ({"here": v}, {k: c[k] for k in ("example_id", "group")}), r"columns: there is no split"),
    "group": (lambda v, c: ({"here": v}, split_group(c)), r"columns\.group: g0 has rows of split test and of train"),
    "example": (
        lambda v, c: ({"here": v}, c | {"group": ["x", *c["group"][1:]]}),
        r"columns\.example_id: e0 has rows of group x and of g0",
    ),
    "split name": (lambda v, c: ({"here": v}, c | {"split": ["dev"] * ROWS}), r"columns\.split: 'dev' is not one of train"),
    "position": (lambda v, c: ({"here": v}, c | {"position": [4] * ROWS}), r"two rows of e0 have position 4"),
    "position type": (lambda v, c: ({"here": v}, c | {"position": ["a"] * ROWS}), r"columns\.position: not of type int32"),
    "null": (lambda v, c: ({"here": v}, c | {"group": [None, *c["group"][1:]]}), r"columns\.group: 1 rows have none"),
    "no rows": (lambda v, c: ({"here": v[:0]}, {k: c[k][:0] for k in c}), r"columns: there are no rows"),
    "lengths": (lambda v, c: ({"here": v}, c | {"phase": [1, 2]}), r"columns: no table with a row per vector"),
    "no table": (lambda v, c: ({"here": v}, 7), r"columns: no table with a row per vector"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_makes_no_store_is_one_line_and_leaves_nothing(tmp_path, wrong):
    change, said = WRONG[wrong]
    vectors, given = change(numbered(), columns())
    with pytest.raises(UserError, match=said) as caught:
        write_store(tmp_path / "s", vectors, given, dtype="float32", seed=0, rows_per_shard=64)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_settings_that_make_no_store_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"dtype: 'float64' is not one of bfloat16, float16, float32"):
        written(tmp_path / "s", dtype="float64")
    with pytest.raises(UserError, match=r"rows_per_shard: 0 is below 1"):
        written(tmp_path / "s", rows_per_shard=0)
    with pytest.raises(UserError, match=r"row \d+ holds NaN or inf in float16"):
        written(tmp_path / "s", {"here": numbered() * 1e5}, dtype="float16")


def test_a_store_that_fails_leaves_the_one_before(tmp_path):
    before = written(tmp_path / "s").manifest
    with pytest.raises(UserError):
        written(tmp_path / "s", {"here": with_nan()})
    store = Store(tmp_path / "s")
    store.verify()
    assert store.manifest == before
    assert json.loads((tmp_path / "s/shards" / f"{store.shards[0].name}.json").read_text())["rows"] == 64
