"""Capture of a tiny random GPT-2: rows are what the host reads at the kept tokens, once each, with their own columns."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import BOS, block_entry, tiny_block, tiny_host

from raysae.activations import capture, write
from raysae.activations.capture import CaptureSettings, attempt, capture_block, finish
from raysae.activations.store import Store
from raysae.errors import CaptureError, UserError
from raysae.files import write_json

SITES = ("blocks.0.mlp_hidden", "blocks.1.resid_post")
SETTINGS = CaptureSettings(SITES, "float32", 24, seed=0)


@pytest.fixture(scope="module")
def host():
    return tiny_host()


@pytest.fixture
def blocks():
    return [tiny_block("train", 0), tiny_block("train", 1), tiny_block("validation", 0), tiny_block("test", 0)]


def store_of(host, blocks, root, settings=SETTINGS, share=0.0):
    for block in blocks:
        capture_block(host, block, root, settings)
    manifest = finish(root, [block_entry(b) for b in blocks], settings, host.fingerprint, share)
    write_json(root / "manifest.json", manifest)
    return Store(root)


def expected_rows(host, block, site):
    """(example_id, position) -> (activation, token, group), from each sequence read alone and without padding."""
    rows = {}
    for s, ids in enumerate(block.input_ids):
        read = host.read(torch.from_numpy(ids)[None], None, [site])[site][0]
        for at, token in enumerate(ids):
            if token != BOS:
                key = (block.example_ids[block.example[s][at]], int(block.positions[s][at]))
                rows[key] = (read[at], int(token), block.groups[block.example[s][at]], int(block.sequence_id[s]))
    return rows


@pytest.mark.parametrize("tokens_per_forward", [1, 24, 10_000])
def test_rows_are_the_reads_at_kept_tokens_with_their_columns(host, blocks, tmp_path, tokens_per_forward):
    store = store_of(host, blocks, tmp_path, replace(SETTINGS, tokens_per_forward=tokens_per_forward))
    for block in blocks:
        columns = store.row_columns(block.name).to_pylist()
        for site in SITES:
            expected = expected_rows(host, block, site)
            x = store.shard(site, block.name)
            keys = [(c["example_id"], c["position"]) for c in columns]
            assert len(keys) == len(x) and sorted(keys) == sorted(expected)  # each kept token once, nothing else
            for key, row, c in zip(keys, x, columns, strict=True):
                vector, token, group, sequence = expected[key]
                torch.testing.assert_close(row, vector, atol=1e-5, rtol=1e-5)
                assert (c["token_id"], c["group"], c["sequence_id"], c["split"]) == (
                    token,
                    group,
                    sequence,
                    block.split,
                )


def test_special_tokens_and_padding_are_never_rows(host, blocks, tmp_path):
    store = store_of(host, blocks, tmp_path)
    tokens = [c["token_id"] for b in blocks for c in store.row_columns(b.name).to_pylist()]
    assert BOS not in tokens
    assert len(tokens) == sum(int((ids != BOS).sum()) for b in blocks for ids in b.input_ids)
    train = sum(int((ids != BOS).sum()) for b in blocks[:2] for ids in b.input_ids)
    assert store.manifest["rows"]["train"] == store.rows("train") == train


def test_rows_are_shuffled_across_the_examples_of_a_block(host, blocks, tmp_path):
    store = store_of(host, blocks, tmp_path)
    examples = [c["example_id"] for c in store.row_columns(blocks[0].name).to_pylist()]
    runs = 1 + sum(a != b for a, b in pairwise(examples))
    assert runs > 2 * len(set(examples))


def test_a_block_done_again_has_the_same_bytes(host, blocks, tmp_path):
    one, again, other = (
        capture_block(host, blocks[0], tmp_path / name, settings)
        for name, settings in [("a", SETTINGS), ("b", SETTINGS), ("c", replace(SETTINGS, seed=1))]
    )
    assert one == again and len(one["sha256"]) == 3
    assert one["sha256"] != other["sha256"]
    assert capture_block(host, blocks[0], tmp_path / "a", SETTINGS)["sha256"] == one["sha256"]


def test_a_block_is_done_only_when_its_facts_are_there(host, blocks, tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(write, "write_json", crash)
    with pytest.raises(RuntimeError):
        capture_block(host, blocks[0], tmp_path, SETTINGS)
    assert not capture.done(tmp_path, blocks[0].name)
    monkeypatch.undo()
    capture_block(host, blocks[0], tmp_path, SETTINGS)
    assert capture.done(tmp_path, blocks[0].name)
    assert not [p for p in tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_rows_are_the_reads_rounded_and_sums_are_of_what_is_stored(host, blocks, tmp_path, dtype):
    full = store_of(host, blocks, tmp_path / "full")
    half = store_of(host, blocks, tmp_path / "half", replace(SETTINGS, dtype=dtype))
    site, names = SITES[1], half.names("train")
    for name in names:
        assert torch.equal(half.shard(site, name), full.shard(site, name).to(getattr(torch, dtype)))
    x = torch.cat([half.shard(site, name) for name in names]).double().numpy()
    np.testing.assert_allclose(half.mean(site).numpy(), x.mean(0), rtol=1e-12)


def test_moments_are_of_the_training_rows_alone(host, blocks, tmp_path):
    store = store_of(host, blocks, tmp_path)
    for site in SITES:
        x = np.concatenate([store.shard(site, n).double().numpy() for n in store.names("train")])
        facts = store.site(site)
        np.testing.assert_allclose(facts["mean"], x.mean(0), rtol=1e-12, atol=1e-14)
        assert facts["mean_square_norm"] == pytest.approx((x**2).sum(1).mean(), rel=1e-12)
        assert facts["d_model"] == x.shape[1] == host.width(site)
        everything = np.concatenate([store.shard(site, b.name).double().numpy() for b in blocks])
        assert not np.allclose(facts["mean"], everything.mean(0), rtol=1e-6)


def test_the_finished_store_verifies(host, blocks, tmp_path):
    store = store_of(host, blocks, tmp_path)
    store.verify()
    store.check_model(host.fingerprint)
    assert store.sites == list(SITES)


# ----------------------------------------------------------------------------------------------------------------------
# Rows with NaN or inf


class Spoiled:
    """A host whose reads hold NaN at one site and inf at the other, at one token each."""

    def __init__(self, host, tokens):
        self.host, self.tokens = host, tokens

    def width(self, site):
        return self.host.width(site)

    def read(self, input_ids, attention_mask, sites):
        reads = self.host.read(input_ids, attention_mask, sites)
        reads = {site: x.clone() for site, x in reads.items()}
        for site, token, value in zip(SITES, self.tokens, (float("nan"), float("inf")), strict=True):
            reads[site][..., 0][input_ids == token] = value
        return reads


def test_non_finite_rows_are_dropped_at_every_site_and_counted(host, blocks, tmp_path):
    block = blocks[0]
    flat = np.concatenate(block.input_ids)
    bad = [int(t) for t in np.unique(flat[flat != BOS])[:2]]
    facts = capture_block(Spoiled(host, bad), block, tmp_path / "bad", SETTINGS)
    dropped = int(np.isin(flat, bad).sum())
    assert facts["non_finite"] == dropped > 0
    assert facts["rows"] == int((flat != BOS).sum()) - dropped
    clean = store_of(host, blocks, tmp_path / "clean")
    for other in blocks[1:]:
        capture_block(host, other, tmp_path / "bad", SETTINGS)
    manifest = finish(tmp_path / "bad", [block_entry(b) for b in blocks], SETTINGS, host.fingerprint, 0.9)
    write_json(tmp_path / "bad/manifest.json", manifest)
    store = Store(tmp_path / "bad")
    columns = store.row_columns(block.name).to_pylist()
    assert not {c["token_id"] for c in columns} & set(bad)
    keep = [i for i, c in enumerate(clean.row_columns(block.name).to_pylist()) if c["token_id"] not in bad]
    for site in SITES:
        assert torch.equal(store.shard(site, block.name), clean.shard(site, block.name)[keep])
        assert store.site(site)["non_finite"] == dropped
        assert np.isfinite(store.site(site)["mean"]).all()
    assert columns == [clean.row_columns(block.name).to_pylist()[i] for i in keep]
    store.verify()


def test_too_many_non_finite_rows_are_the_users_to_know(host, blocks, tmp_path):
    flat = np.concatenate(blocks[0].input_ids)
    bad = [int(t) for t in np.unique(flat[flat != BOS])[:2]]
    capture_block(Spoiled(host, bad), blocks[0], tmp_path, SETTINGS)
    entry = block_entry(blocks[0])
    share = int(np.isin(flat, bad).sum()) / entry["rows"]
    finish(tmp_path, [entry], SETTINGS, {}, share)  # just allowed
    with pytest.raises(UserError, match=r"capture\.max_non_finite_fraction: .*NaN or inf") as caught:
        finish(tmp_path, [entry], SETTINGS, {}, share * 0.99)
    assert "\n" not in str(caught.value)


def test_rows_of_huge_norm_are_dropped_at_every_site_and_counted_where_asked(host, blocks, tmp_path):
    class Sinks(Spoiled):
        """A hundred times the norm: one token at one site, another at the other."""

        def read(self, input_ids, attention_mask, sites):
            reads = {site: x.clone() for site, x in self.host.read(input_ids, attention_mask, sites).items()}
            for site, token in zip(SITES, self.tokens, strict=True):
                reads[site][input_ids == token] *= 100
            return reads

    block = blocks[0]
    flat = np.concatenate(block.input_ids)
    sinks = [int(t) for t in np.unique(flat[flat != BOS])[:2]]
    several, rows = int(np.isin(flat, sinks).sum()), int((flat != BOS).sum())
    for ratio, dropped in ((None, 0), (20.0, several), (1e6, 0)):
        settings, root = replace(SETTINGS, max_norm_ratio=ratio), tmp_path / str(ratio)
        facts = capture_block(Sinks(host, sinks), block, root, settings)
        assert (facts["rows"], facts["norm_outliers"], facts["non_finite"]) == (rows - dropped, dropped, 0)
        manifest = finish(root, [block_entry(block)], settings, host.fingerprint, 0.0)
        assert manifest["norm_outliers"] == dropped and manifest["rows"]["train"] == rows - dropped
        write_json(root / "manifest.json", manifest)
        store = Store(root)
        tokens = {c["token_id"] for c in store.row_columns(block.name).to_pylist()}
        assert bool(tokens & {*sinks}) == (dropped == 0)
        assert all(len(store.shard(site, block.name)) == rows - dropped for site in SITES)


def test_values_that_overflow_float16_are_non_finite(host, blocks, tmp_path):
    class Huge(Spoiled):
        def read(self, input_ids, attention_mask, sites):
            return {site: x * 1e5 for site, x in self.host.read(input_ids, attention_mask, sites).items()}

    lost = {}
    for dtype in ("float16", "bfloat16"):
        settings = replace(SETTINGS, dtype=dtype)
        lost[dtype] = capture_block(Huge(host, []), blocks[0], tmp_path / dtype, settings)["non_finite"]
    assert lost["float16"] > 0 and lost["bfloat16"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# A capture that is not whole


def test_a_missing_row_is_a_fault(host, blocks, tmp_path):
    capture_block(host, blocks[0], tmp_path, SETTINGS)
    entry = block_entry(blocks[0])
    said = f"{entry['rows'] + 1} tokens were to be captured, the shards hold {entry['rows']}"
    with pytest.raises(CaptureError, match=said):
        finish(tmp_path, [{**entry, "rows": entry["rows"] + 1}], SETTINGS, {}, 0.5)


def test_a_missing_shard_is_a_fault_that_names_it(host, blocks, tmp_path):
    capture_block(host, blocks[0], tmp_path, SETTINGS)
    with pytest.raises(CaptureError, match=blocks[1].name):
        finish(tmp_path, [block_entry(b) for b in blocks[:2]], SETTINGS, {}, 0.5)


def test_a_block_that_keeps_killing_its_host_is_named(tmp_path):
    for _ in range(3):
        attempt(tmp_path, "train-00007-abc", limit=2)
    with pytest.raises(CaptureError, match="train-00007-abc"):
        attempt(tmp_path, "train-00007-abc", limit=2)
    attempt(tmp_path, "train-00008-abc", limit=2)


def test_a_held_out_store_is_about_its_own_mean(host, blocks, tmp_path):
    held_out = [tiny_block("test", 5), tiny_block("test", 6)]
    store = store_of(host, held_out, tmp_path)
    x = torch.cat([store.shard(SITES[0], name) for name in store.names("test")]).double()
    assert torch.allclose(store.mean(SITES[0]), x.mean(0))
    assert store.site(SITES[0])["mean_square_norm"] == pytest.approx(x.square().sum(1).mean().item())
