"""Activations: what a model computes at its sites, on every token row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raysae.activations import capture
from raysae.activations.write import Vectors, is_written, write_vectors
from raysae.errors import UserError
from raysae.models.registry import default_site
from raysae.models.sites import order_sites
from raysae.progress import say
from raysae.stages.work import over_blocks
from raysae.workspace import Inputs, Made, Stage

if TYPE_CHECKING:
    from raysae.bench import Bench
    from raysae.config.sections import CaptureConfig
    from raysae.stages.model import Model


class Captured(NamedTuple):
    """A store, and what it is of: a model on tokens, unless it is of vectors from elsewhere."""

    store: Stage
    tokens: Stage | None = None
    model: Model | None = None

    @property
    def inputs(self) -> dict[str, Stage]:
        """Of a stage that reads all there is of it."""
        of_tokens = {"tokens": self.tokens} if self.tokens else {}
        return {"store": self.store, **of_tokens, **(self.model.inputs if self.model else {})}


def captured(tokens: Stage, model: Model, sites: Sequence[str], config: CaptureConfig, seed: int) -> Captured:
    """The activations of a model at some sites on tokens."""
    return Captured(store(tokens, model, sites, config, seed), tokens, model)


def vectors(
    settings: Mapping[str, Any], make: Callable[[], tuple[Mapping[str, Vectors], Any]], *, dtype: str = "float32",
    seed: int = 0, rows_per_shard: int = 65_536,
) -> Captured:  # fmt: skip
    """A store of what `make` gives, vectors by site and the columns of their rows, as `activations.write_store` takes them.

    settings: what these depend on; they name the store.
    """

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        by_site, columns = make()
        return write_vectors(path, by_site, columns, dtype=dtype, seed=seed, rows_per_shard=rows_per_shard)

    named = {"vectors": settings, "dtype": dtype, "seed": seed, "rows_per_shard": rows_per_shard}
    return Captured(Stage("store", 3, named, {}, build))


def store(tokens: Stage, model: Model, sites: Sequence[str], config: CaptureConfig, seed: int) -> Stage:
    """The activation store of some sites: see docs/store.md."""
    taken = capture.CaptureSettings(tuple(sites), config.dtype, config.tokens_per_forward, seed, config.max_norm_ratio)

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        read = inputs["tokens"]
        check_vocabulary(read, model)
        blocks = read.manifest["blocks"]
        work = {"capture": capture.Capture(path, taken)}
        cost = over_blocks(bench, work, blocks, is_written, read.path, model.loading(inputs))
        facts = capture.finish(path, blocks, taken, model.fingerprint(inputs), config.max_non_finite_fraction)
        lost = {f"rows of more than {config.max_norm_ratio or 0:g} times the median norm": facts["norm_outliers"]}
        lost["rows with NaN or inf"] = next(iter(facts["sites"].values()))["non_finite"]
        lost = {what: count for what, count in lost.items() if count}
        for what, count in lost.items():
            say(f"capture: left out: {count:,} {what}")
        facts["left_out"] = {**read.manifest["left_out"], **lost}
        facts["not_compared"] = read.manifest["not_compared"]
        return {**facts, "cost": {"tokens": sum(facts["rows"].values()), **cost}}

    def settings(inputs: Inputs) -> dict[str, Any]:
        return {
            "model": model.identity(inputs),
            "model_dtype": model.dtype,
            "sites": list(sites),
            "dtype": config.dtype,
            "max_non_finite_fraction": config.max_non_finite_fraction,
            "max_norm_ratio": config.max_norm_ratio,
            "seed": seed,
        }

    needed = {"tokens": tokens, **model.inputs}
    return Stage("store", 3, settings, needed, build, implied=frozenset(model.inputs))


def check_vocabulary(tokens: Made, model: Model) -> None:
    """UserError where the tokenizer makes what the model has no embedding for."""
    largest, rows = tokens.manifest["largest_id"], model.facts.vocab_size
    if largest >= rows:
        raise UserError(
            f"model.tokenizer: {model.tokenizer_name!r} makes token {largest}, but the model's embedding has {rows} rows; "
            "name the model's own tokenizer"
        )


def sites_of(model: Model, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The sites to capture, checked against the model, in order of computation; unset, the model's default."""
    n_blocks = model.facts.n_blocks
    names = tuple(s.name for s in order_sites(wanted or (default_site(model.name, n_blocks),), n_blocks))
    for name in names:
        model.facts.width(name)  # refuses one that only other architectures have
    return names
