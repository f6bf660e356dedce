"""The store's reader: every row once per epoch, in a stream that can be entered anywhere; files that cannot be spoiled."""

from itertools import islice

import numpy as np
import pytest
import torch
from helpers import tiny_store

from raysae.activations.store import Store
from raysae.errors import UserError
from raysae.files import read_json, write_json

SITE = "blocks.0.resid_post"
SIZES = (7, 5, 11, 1)
TOTAL = sum(SIZES)


def numbered(start, rows):
    """Rows that say which they are."""
    return torch.arange(start, start + rows, dtype=torch.float32)[:, None].repeat(1, 3)


@pytest.fixture
def store(tmp_path):
    starts = np.cumsum([0, *SIZES])
    train = [("train", numbered(start, n)) for start, n in zip(starts, SIZES, strict=False)]
    return tiny_store(tmp_path, [train[0], ("validation", numbered(1000, 4)), *train[1:], ("test", numbered(2000, 3))])


def ids(batches):
    return [int(row) for batch in batches for row in batch[:, 0]]


@pytest.mark.parametrize("batch_size", [1, 3, 6, 24, 50])
def test_every_row_comes_once_per_epoch(store, batch_size):
    epochs = 3
    count = -(-epochs * TOTAL // batch_size)
    batches = list(islice(store.batches(SITE, "train", batch_size), count))
    assert {b.shape for b in batches} == {(batch_size, 3)}
    seen = ids(batches)
    for epoch in range(epochs):
        assert sorted(seen[epoch * TOTAL : (epoch + 1) * TOTAL]) == list(range(TOTAL))


def test_epochs_come_in_other_orders_and_another_seed_too(store):
    seen = ids(islice(store.batches(SITE, "train", 1), 6 * TOTAL))
    epochs = {tuple(seen[i * TOTAL : (i + 1) * TOTAL]) for i in range(6)}
    assert len(epochs) > 1
    first = {tuple(ids(islice(store.batches(SITE, "train", 1, seed=s), TOTAL))) for s in range(6)}
    assert len(first) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 6, 50])
def test_a_stream_entered_at_k_is_the_stream_less_k_batches(store, batch_size):
    count = 3 * TOTAL // batch_size + 4
    whole = list(islice(store.batches(SITE, "train", batch_size, seed=3), count))
    for k in range(count):
        late = islice(store.batches(SITE, "train", batch_size, seed=3, start=k), count - k)
        assert ids(late) == ids(whole[k:]), k


def test_an_empty_split_is_refused(store, tmp_path):
    alone = tiny_store(tmp_path / "alone", [("train", numbered(0, 3))])
    with pytest.raises(UserError, match="no validation rows"):
        next(alone.batches(SITE, "validation", 2))


def test_head_takes_the_first_rows_of_a_split_across_shards(store):
    assert ids([store.head(SITE, "train", 9)]) == list(range(9))
    assert ids([store.head(SITE, "train", 999)]) == list(range(TOTAL))
    assert ids([store.head(SITE, "validation", 2)]) == [1000, 1001]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_keep_their_bits_in_every_dtype(tmp_path, dtype):
    x = torch.randn(13, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    store = tiny_store(tmp_path, [("train", x[:6]), ("train", x[6:])])
    assert store.head(SITE, "train", 99).dtype == dtype
    assert torch.equal(store.head(SITE, "train", 99), x)
    assert sorted(next(store.batches(SITE, "train", 13))[:, 0].tolist()) == sorted(x[:, 0].tolist())


def test_a_shard_without_rows_is_no_obstacle(tmp_path):
    store = tiny_store(tmp_path, [("train", numbered(0, 0)), ("train", numbered(0, 4)), ("train", numbered(4, 0))])
    assert sorted(ids(islice(store.batches(SITE, "train", 2), 2))) == [0, 1, 2, 3]


def test_writing_to_what_was_read_does_not_change_the_file(store):
    name = store.names("train")[0]
    store.shard(SITE, name)[:] = -5
    next(store.batches(SITE, "train", 2))[:] = -6
    store.verify()


# ----------------------------------------------------------------------------------------------------------------------
# Rows with labels and neighbours


@pytest.fixture
def examples(tmp_path):
    """40 examples of 2-6 tokens with gaps in some, shuffled over three shards; x says which row it is, `step` labels it."""
    rng = np.random.default_rng(0)
    rows = [
        (e, p, (e + p) % 3 - 1) for e in range(40) for p in sorted(rng.choice(9, rng.integers(2, 7), replace=False))
    ]
    order = rng.permutation(len(rows))
    parts = [[rows[i] for i in part] for part in np.array_split(order, 3)]

    def columns(part):
        ids, positions, steps = zip(*part, strict=True)
        return {"example_id": [f"e{e}" for e in ids], "position": positions, "step": steps}

    shards = [("train", torch.tensor([[e, p] for e, p, _ in part], dtype=torch.float32)) for part in parts]
    return tiny_store(tmp_path, shards, columns={i: columns(part) for i, part in enumerate(parts)}), rows


@pytest.mark.parametrize("neighbours", [True, False])
def test_labelled_batches_hold_every_row_once_per_epoch_with_its_label(examples, neighbours):
    store, rows = examples
    stream = store.labelled_batches(SITE, "train", len(rows), "step", neighbours=neighbours, seed=3)
    epochs = [next(stream) for _ in range(2)]
    for x, labels, _ in epochs:
        found = [(int(e), int(p), int(t)) for (e, p), t in zip(x.tolist(), labels.tolist(), strict=True)]
        assert sorted(found) == sorted(rows)
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert store.label_count("train", "step") == 2


def test_only_the_next_token_of_the_same_example_follows(examples):
    store, _ = examples
    stream = store.labelled_batches(SITE, "train", 25, "step", neighbours=True, seed=3)
    pairs = 0
    for _ in range(12):  # more than an epoch: batches run on across it
        x, _, follows = next(stream)
        assert not follows[0]
        for before, row, after in zip(x[:-1], x[1:], follows[1:], strict=True):
            assert bool(after) == (row[0] == before[0] and row[1] == before[1] + 1)
        pairs += int(follows.sum())
    assert pairs > 50
    assert not next(store.labelled_batches(SITE, "train", 25, "step", neighbours=False))[2].any()


@pytest.mark.parametrize("neighbours", [True, False])
def test_a_labelled_stream_entered_at_k_is_the_stream_less_k_batches(examples, neighbours):
    store, _ = examples
    whole = store.labelled_batches(SITE, "train", 17, "step", neighbours=neighbours, seed=1)
    batches = [next(whole) for _ in range(14)]
    for start in (1, 8, 13):
        entered = next(store.labelled_batches(SITE, "train", 17, "step", neighbours=neighbours, seed=1, start=start))
        assert all(torch.equal(one, two) for one, two in zip(entered, batches[start], strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_flipped_byte_and_a_missing_file_are_found(store):
    store.verify()
    x, rows = f"{store.names('train')[1]}.safetensors", f"{store.names('test')[0]}.parquet"
    for file in (store.path / SITE / x, store.path / "rows" / rows):
        content = file.read_bytes()
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(UserError, match=f"{file.name} does not match its sha256"):
            store.verify()
        file.unlink()
        with pytest.raises(UserError, match=f"{file.name} is missing"):
            store.verify()
        file.write_bytes(content)
        store.verify()


def test_a_newer_schema_is_refused(store):
    manifest = read_json(store.path / "manifest.json")
    write_json(store.path / "manifest.json", manifest | {"schema_version": manifest["schema_version"] + 1})
    with pytest.raises(UserError, match=r"schema version 2.*upgrade raysae"):
        Store(store.path)


def test_a_capture_that_has_not_finished_is_no_store(tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        Store(tmp_path)


def test_a_store_of_another_model_is_refused(store):
    mine = store.manifest["model"]
    store.check_model(mine)
    store.check_model({**mine, "name": "the same weights elsewhere"})
    for key in ("class", "revision", "weights"):
        with pytest.raises(UserError, match="was made with"):
            store.check_model({**mine, key: "other"})


def test_an_unknown_site_is_named_with_those_there_are(store):
    with pytest.raises(UserError, match=r"no site blocks\.1\.resid_pre; it has blocks\.0\.resid_post"):
        store.mean("blocks.1.resid_pre")


def test_what_varies_is_told_apart_from_the_mean_and_nothing_varying_is_refused(tmp_path):
    x = torch.randn(500, 8) + 100
    store = tiny_store(tmp_path / "far", [("train", x)])
    varies = x.double().var(0, correction=0).sum().item()
    assert store.variance(store.sites[0]) == pytest.approx(varies, rel=1e-6)
    assert store.offset(store.sites[0]) == pytest.approx((x.double().square().sum(1).mean().item() / varies) ** 0.5)
    same = tiny_store(tmp_path / "same", [("train", torch.full((500, 8), 3.25))])
    with pytest.raises(UserError, match=r"capture\.sites: all training rows of .* are the same"):
        same.variance(same.sites[0])
