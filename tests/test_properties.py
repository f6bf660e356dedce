"""Properties that hold whatever the sizes, seeds and values: the stream of a store, splits, configs as YAML, the fold.

The examples are the same at every run: a test that fails here fails again.
"""

from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raysae.activations import write_store
from raysae.activations.source import Subset
from raysae.activations.store import Store
from raysae.config.jobs import SweepJob
from raysae.config.load import dump_yaml, load_config
from raysae.data.records import make_problem
from raysae.data.splits import SPLITS, assign_splits
from raysae.sae.architectures import ARCHITECTURES, SAEConfig, initial_parameters
from raysae.sae.sae import SAE, fold

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)

# ----------------------------------------------------------------------------------------------------------------------
# The store's stream

shapes = st.sampled_from([(1, 1), (7, 3), (12, 4), (12, 100), (31, 8)])
"""(training rows, rows per shard)"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store whose rows say which they are, by its shape; every third row is of kind 1."""

    @cache
    def store(shape: tuple[int, int]) -> Store:
        rows, per_shard = shape
        number = np.arange(rows)
        columns = {
            "example_id": [f"e{i // 3}" for i in number],
            "group": [f"e{i // 3}" for i in number],
            "split": ["train"] * rows,
            "kind": (number % 3 == 0).astype(int),
        }
        path = tmp_path_factory.mktemp("store") / "s"
        return write_store(path, {"x": np.stack([number, number // 3], 1)}, columns, rows_per_shard=per_shard)

    return store


def rows_in(batches):
    return [int(row[0]) for batch in batches for row in batch]


@few
@given(shapes, st.integers(1, 40), seeds, st.booleans())
def test_every_row_comes_once_per_epoch_and_the_seed_gives_the_order(stores, shape, batch_size, seed, part):
    source = Subset(stores(shape), "kind", 1) if part else stores(shape)
    rows = source.rows("train")
    expected = [i for i in range(shape[0]) if i % 3 == 0 or not part]
    assert rows == len(expected)

    def stream(start=0):
        return source.batches("x", "train", batch_size, seed=seed, start=start)

    batches = [*islice(stream(), -(-2 * rows // batch_size))]
    seen = rows_in(batches)
    assert all(len(batch) == batch_size for batch in batches)
    assert sorted(seen[:rows]) == sorted(seen[rows : 2 * rows]) == expected
    assert rows_in(islice(stream(), len(batches))) == seen


@few
@given(shapes, st.integers(1, 40), seeds, st.integers(0, 60), st.sampled_from(["plain", "labelled", "neighbours"]))
def test_a_stream_entered_at_a_step_goes_on_as_if_it_had_run(stores, shape, batch_size, seed, start, how):
    store = stores(shape)

    def stream(start=0):
        if how == "plain":
            return ((x,) for x in store.batches("x", "train", batch_size, seed=seed, start=start))
        neighbours = how == "neighbours"
        return store.labelled_batches("x", "train", batch_size, "kind", neighbours=neighbours, seed=seed, start=start)

    whole = [*islice(stream(), start, start + 3)]
    for one, other in zip(whole, islice(stream(start), 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Splits

fractions = st.floats(0.01, 0.45)


@few
@given(
    st.lists(st.integers(1, 6), min_size=3, max_size=40), fractions, fractions, seeds, st.randoms(use_true_random=False)
)
def test_groups_go_whole_to_the_splits_and_fill_them_up_to_their_fractions(sizes, validation, test, seed, random):
    names = [(group, i) for group, size in enumerate(sizes) for i in range(size)]
    problems = [make_problem(f"{g}/{i}", "toy", f"text {g} {i}", group=f"g{g}") for g, i in names]
    assigned = assign_splits(problems, validation, test, None, seed)
    assert [p.example_id for p in assigned] == [p.example_id for p in problems]
    split_of: dict[str, set[str]] = {}
    for p in assigned:
        split_of.setdefault(p.group, set()).add(p.split)
    assert len(split_of) == len(sizes) and all(len(splits) == 1 for splits in split_of.values()), "a group was cut"
    counts = {split: sum(p.split == split for p in assigned) for split in SPLITS}
    assert min(counts.values()) > 0
    for split, fraction in (("validation", validation), ("test", test)):
        target, groups = fraction * len(problems), sum(splits == {split} for splits in split_of.values())
        assert counts[split] <= target + 0.5 or groups == 1, "more than was asked, and not for want of a smaller group"
        if max(sizes) == 1:
            assert abs(counts[split] - target) <= 0.5 or counts[split] == 1
    shuffled = [*problems]
    random.shuffle(shuffled)
    again = assign_splits(shuffled, validation, test, None, seed)
    assert {p.example_id: p.split for p in again} == {p.example_id: p.split for p in assigned}, (
        "by its place in the file"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Configs

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
positive = st.floats(1e-6, 1e6, allow_nan=False)
values = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 1000),
        "data": st.fixed_dictionaries(
            {"source": st.just("text"), "path": st.just("some/text.txt")},
            optional={
                "text_separator": text,
                "examples": st.integers(10, 10**9),
                "validation_fraction": fractions,
                "near_duplicate_similarity": st.none() | st.floats(0.1, 0.9),
                "context_length": st.none() | st.integers(8, 4096),
                "columns": st.fixed_dictionaries({}, optional={"question": text, "group": st.none() | text}),
            },
        ),
        "capture": st.fixed_dictionaries(
            {}, optional={"max_norm_ratio": st.none() | positive, "dtype": st.sampled_from(["bfloat16", "float16"])}
        ),
        "sweep": st.fixed_dictionaries(
            {"search": st.just("grid")},
            optional={
                "expansion_factors": st.lists(st.integers(1, 64).map(float), min_size=1, max_size=4, unique=True),
                "l1_coefficients": st.lists(positive, min_size=1, max_size=4, unique=True),
                "seeds": st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
            },
        ),
        "model": st.fixed_dictionaries({}, optional={"name": text, "revision": st.none() | text}),
        "tracking": st.fixed_dictionaries({}, optional={"wandb_project": st.none() | text}),
    },
)


@settings(few, max_examples=12)
@given(values)
def test_a_config_comes_back_from_its_yaml(tmp_path_factory, given_values):
    try:
        config = SweepJob(**given_values)
    except ValidationError:
        reject()
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    again = load_config(SweepJob, ["--config", str(file)])
    assert again == config and dump_yaml(again) == dump_yaml(config)


# ----------------------------------------------------------------------------------------------------------------------
# The fold


def random_sae(architecture: str, seed: int) -> SAE:
    config = SAEConfig(architecture, 6, 20, k=4, l1_coefficient=0.1, target_l0=4.0, l0_coefficient=0.1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    start = initial_parameters(config, torch.randn(6, generator=generator))
    moved = {name: p + 0.3 * torch.randn(p.shape, generator=generator).abs() for name, p in start.items()}
    return SAE(config, moved)


@few
@given(st.sampled_from(sorted(ARCHITECTURES)), seeds, st.integers(-12, 12))
def test_a_folded_sae_does_on_raw_rows_what_it_did_on_scaled_ones(architecture, seed, exponent):
    """To the bit, where the factor is a power of two: no rounding hides what another formula would change."""
    sae, factor = random_sae(architecture, seed), 2.0**exponent
    folded = SAE(sae.config, fold(sae.parameters, factor))
    scaled = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)) + 1
    x = scaled / factor
    assert (sae.encode(scaled) != 0).any()
    assert torch.equal(folded.encode(x), sae.encode(scaled))
    assert torch.equal(folded(x) * factor, sae(scaled))
    back = fold(folded.parameters, 1 / factor)
    assert all(torch.equal(back[name], p) for name, p in sae.parameters.items())
