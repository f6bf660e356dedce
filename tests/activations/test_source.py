"""What a trial reads from: a store that travels by its path, and the part of one in which a column has a value."""

import pickle
from itertools import islice

import numpy as np
import pytest
import torch

from raysae.activations import write_store
from raysae.activations.source import Source, Subset
from raysae.activations.store import Store
from raysae.errors import UserError
from raysae.sae.architectures import SAEConfig
from raysae.sae.train import Member, Recipe
from raysae.sweep.trial import Trial, train_pack

EXAMPLES, LENGTH = 60, 5
SITE = "here"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Examples of five rows: x says which row it is, and lies elsewhere at each position."""
    example, position = np.divmod(np.arange(EXAMPLES * LENGTH), LENGTH)
    x = np.stack([example, position, 100.0 * position], 1)
    columns = {
        "example_id": [f"e{e}" for e in example],
        "group": [f"g{e}" for e in example],
        "split": np.array(["train", "train", "validation"])[example % 3],
        "phase": example % 4,
        "kind": [f"k{e % 2}" for e in example],
    }
    return write_store(tmp_path_factory.mktemp("store") / "s", {SITE: x}, columns, rows_per_shard=48)


def test_a_source_arrives_as_it_was_sent(store):
    for source in (store, Subset(store, "position", 2), Subset(Subset(store, "position", 2), "kind", "k1")):
        there: Source = pickle.loads(pickle.dumps(source))
        assert there == source and hash(there) == hash(source) and there is not source
        assert torch.equal(there.head(SITE, "train", 99), source.head(SITE, "train", 99))
        assert torch.equal(there.mean(SITE), source.mean(SITE))
    assert Subset(store, "position", 2) != Subset(store, "position", 1) and Subset(store, "position", 2) != store
    assert len(pickle.dumps(store)) < 500, "its path, not what is in it"


@pytest.mark.parametrize("column, value", [("position", 3), ("kind", "k1"), ("phase", 0)])
def test_a_subset_has_the_rows_of_its_value_and_no_others(store, column, value):
    part = Subset(store, column, value)
    for split in ("train", "validation"):
        whole = torch.cat([store.shard(SITE, name) for name in store.names(split)])
        values = np.concatenate([store.row_columns(n, (column,))[column].to_pandas() for n in store.names(split)])
        expected = whole[torch.from_numpy(values == value)]
        assert part.rows(split) == len(expected) > 0
        assert torch.equal(part.head(SITE, split, 10**6), expected), "in stored order"
        epoch = torch.cat([*islice(part.batches(SITE, split, 1, seed=1), len(expected))])
        assert sorted(epoch.tolist()) == sorted(expected.tolist())
        for name in part.names(split):
            assert part.row_columns(name)["position"].to_pylist() == part.shard(SITE, name)[:, 1].int().tolist()
    train = part.head(SITE, "train", 10**6).double()
    np.testing.assert_allclose(part.mean(SITE), train.mean(0), rtol=1e-12)
    variance = (train - train.mean(0)).square().sum(1).mean()
    assert part.variance(SITE) == pytest.approx(variance.item(), rel=1e-9)
    assert (part.variance(SITE) < store.variance(SITE) / 2) is (column == "position")


def test_labels_and_neighbours_are_those_of_the_subset(store):
    part = Subset(store, "kind", "k0")
    x, labels, follows = next(part.labelled_batches(SITE, "train", 100, "phase", neighbours=True, seed=4))
    assert labels.tolist() == (x[:, 0] % 4).int().tolist() and set(labels.tolist()) == {0, 2}
    assert follows.sum() == 80 and part.label_count("train", "phase") == 3
    alone = Subset(store, "position", 2)
    assert not next(alone.labelled_batches(SITE, "train", 40, "phase", neighbours=True))[2].any()


def test_a_trial_trains_on_a_subset(store, tmp_path):
    recipe = Recipe(
        steps=5, batch_size=16, warmup_steps=1, decay_steps=1, sparsity_warmup_steps=1, dead_after_tokens=99
    )
    member, losses = Member("it", SAEConfig("topk", 3, 6, k=2, seed=0), 1e-3), {}
    for name, source in (("whole", store), ("part", Subset(store, "position", 2))):
        trial = pickle.loads(pickle.dumps(Trial(source, recipe, 1, 0, tmp_path / name, {})))
        train_pack(trial, SITE, [member], lambda rung, n=name: losses.update({n: rung.metrics["it"]["fvu"]}) or ())
    assert np.isfinite([*losses.values()]).all() and losses["whole"] != losses["part"]


def test_what_no_row_has_is_one_line(store):
    with pytest.raises(UserError, match=r"no column colour; it has example_id, group, .*, phase, kind$"):
        Subset(store, "colour", 1)
    with pytest.raises(UserError, match=r"no row with position 9$"):
        Subset(store, "position", 9)
    with pytest.raises(UserError, match=r"no row with position '2'$"):
        Subset(store, "position", "2")
    with pytest.raises(UserError, match=r"no test rows"):
        next(Subset(store, "position", 2).batches(SITE, "test", 1))
    assert isinstance(Subset(store, "position", 2), Store)
