"""The one flow: records → tokens → activations → SAEs → measurements → decision → report.

`sweep(config)` runs every stage that has not been done and returns the `Run`. Each stage is a plain function from its
inputs to a directory (`artifacts.stage`); Ray is started only if a stage has work for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from raysae import __version__
from raysae.artifacts import (
    MANIFEST,
    NotMade,
    Stage,
    fingerprint,
    finished_stage,
    link_or_copy,
    read_json,
    sha256_of,
    stage,
    write_atomic,
    write_json,
)
from raysae.budget import ITEMS, refuse_overspending, spending
from raysae.cluster import Cluster, Placement, connect, disconnect, output_root
from raysae.config import DataConfig, SweepConfig, SweepJob, dump_yaml
from raysae.data.records import read_records, write_records
from raysae.data.sources import load_problems
from raysae.data.splits import assign_splits, unseen
from raysae.data.tokens import tokenize
from raysae.environment import environment
from raysae.errors import UserError
from raysae.evaluate.nulls import ELSEWHERE, beside
from raysae.evaluate.stability import columns as stability_columns
from raysae.gates.criteria import Gate, check_must_beat, load_gate, passes
from raysae.gates.select import choose, decide, pareto_front
from raysae.gates.waivers import load_waiver, read_basis
from raysae.models.embedded import build_tokenizer, embedded_facts, train_embedded
from raysae.models.host import ModelFacts, fingerprint_of, load_tokenizer, model_facts, save_with_random_weights
from raysae.models.registry import default_site
from raysae.models.sites import order_sites
from raysae.progress import Progress, say
from raysae.report.page import write_report
from raysae.run import Run
from raysae.sae.conventions import L1_UNITS
from raysae.sae.losses import Losses
from raysae.sae.train import Recipe
from raysae.schedule import activation_bytes, sae_bytes
from raysae.sweep.collect import alike, curves, training_table
from raysae.sweep.replay import Replay
from raysae.sweep.space import COEFFICIENT, Common, Proposal, proposals, recipe

STAGE_VERSIONS = {
    "model": 1, "records": 1, "tokens": 1, "store": 1, "sweep": 4, "nulls": 1, "null_model": 1, "evaluation": 3,
    "stability": 1, "domains": 1, "transfer": 1, "invariance": 1, "probes": 1, "features": 1,
}  # fmt: skip
"""Raised when a stage's code changes what it makes, so that what an older raysae made is not taken for it."""

TRANSFER = "transfer_"
"""Before the name of a stage: it is of another dataset than the run's, all of it held out. The code is the same."""

FEATURES = ("features", "feature_rows", "contexts")
"""Fields of the evaluation that are about features only: the evaluation stage does not depend on them."""
FEATURE_FILES = ("cards.jsonl", "features.parquet", "features.json")

CONTEXT_AT_MOST = 512
"""Context length where neither the config nor the model asks for less."""
MAX_DROPPED = 0.5
"""Share of examples that may be too long for the context before that is the user's mistake."""


def sweep(config: SweepJob) -> Run:
    """Run the main job of `config` and return its `Run`; what has been done before is not done again.

    Raises UserError for a mistake in the config or the input, before anything is written where that can be known.
    """
    flow = Flow(config)
    try:
        return flow.run()
    finally:
        flow.close()


class Controls(NamedTuple):
    """Nulls, the store of the model that they read, and their measurements on it."""

    nulls: Stage
    store: Stage
    measured: Stage


class Prepared(NamedTuple):
    """What a run has before its model is asked for anything."""

    records: Stage
    tokens: Stage
    away: dict[str, tuple[Stage, Stage]]
    """Records and tokens of each dataset to transfer to."""


class Flow:
    """The stages of one job. Each is a method that returns its finished `Stage`.

    With a `replay` the sweep trains its points, and stops SAEs where it says, in place of searching and pruning.
    """

    def __init__(self, config: SweepJob, replay: Replay | None = None) -> None:
        self.config, self.replay = config, replay
        self.root = output_root(config.output, given="output" in config.model_fields_set)
        self.gate: Gate = load_gate(config.gate)
        self.waiver = load_waiver(config.waiver, self.gate, config.basis) if config.waiver else None
        self.basis = read_basis(config.basis, self.waiver) if config.basis else None
        self.finished: list[Stage] = []
        self._cluster: Cluster | None = None
        self._only_find = False
        self._fingerprints: dict[str, dict[str, str | None]] = {}
        s = config.sweep
        for field, names, known in (
            ("architectures", s.architectures, COEFFICIENT),
            ("ranges", s.ranges, COEFFICIENT),
            ("coefficients", s.coefficients, COEFFICIENT),
            ("l1_units", [s.l1_units], L1_UNITS),
        ):
            for name in names:
                if name not in known:
                    raise UserError(f"sweep.{field}: {name!r} is not allowed; allowed: {', '.join(known)}")
        check_must_beat(self.gate, config.evaluation.nulls, config.gate)
        self._check_run()

    def run(self) -> Run:
        """All stages, then the run's directory."""
        records, tokens, away = self.prepare()
        model = self.model()
        store = self.store(tokens, model)
        sae_stage = self.saes(store, tokens)
        nulls = self._own_nulls(sae_stage, store, tokens)
        validation = self.evaluation("validation", sae_stage, store, tokens, model, nulls)
        controls = [Controls(nulls, store, validation)]
        if ELSEWHERE in self.config.evaluation.nulls:
            controls.append(self._untrained_model(sae_stage, tokens, model))
        return self._finish(sae_stage, validation, controls, records, store, tokens, model, away)

    def prepare(self) -> Prepared:
        """What costs seconds: the config's checks, the records, the tokens, and whether the budget is enough."""
        name = self.config.model.name
        self._tokenizer(name)
        if name != "embedded":
            self._fingerprint(name)
        self._check_budget()
        say(f"run {self.directory}")
        records = self.records()
        self._check_labels(records)
        tokens = self.tokens(records, name)
        self._check_budget(tokens)
        return Prepared(records, tokens, self._held_out(name, records))

    def made(self, tokens: Stage) -> list[Stage]:
        """Stages after the tokens that are finished already; none after the first that is not."""
        before, self._only_find = len(self.finished), True
        try:
            model = self.model()
            store = self.store(tokens, model)
            saes = self.saes(store, tokens)
            self.evaluation("validation", saes, store, tokens, model, self._own_nulls(saes, store, tokens))
        except NotMade:
            pass
        finally:
            self._only_find = False
        return self.finished[before:]

    def close(self) -> None:
        if self._cluster is not None:
            disconnect(self._cluster)

    # ------------------------------------------------------------------------------------------------------------------
    # Stages

    def model(self) -> str:
        """Name or path of the model; the embedded one is trained on first use."""
        if self.config.model.name != "embedded":
            return self.config.model.name

        def build(path: Path) -> Mapping[str, Any]:
            say("model: training the embedded GPT-2 (once; later runs take it from the stage)")
            with Progress("model", 0, "step") as progress:

                def advance(step: int, steps: int, loss: float) -> None:
                    progress.total = steps
                    progress.advance(1, f"loss {loss:.3f}")

                made = train_embedded(path, self.config.seed, advance)
            say(f"model: final-answer accuracy {made['accuracy']:.3f} on {made['n_evaluated']} held-out problems")
            return {
                "facts": made,
                "cost": {"tokens": made["tokens"], **_held(torch.get_num_threads(), 0)(made["seconds"])},
            }

        return str(self._stage("model", {"embedded": True, "seed": self.config.seed}, build).path)

    def records(self, held_out: DataConfig | None = None, apart_from: Stage | None = None) -> Stage:
        """Examples with their splits: `records.parquet`. Of the run's data; or of a held-out dataset, whole but for what
        is near to an example of the records `apart_from`."""
        data = held_out or self.config.data

        def build(path: Path) -> Mapping[str, Any]:
            loaded = load_problems(
                data.source, data.path, data.subset, data.hub_split, data.columns.model_dump(), data.text_separator,
                data.text_replace, data.examples, self.config.seed,
            )  # fmt: skip
            found = len(loaded)
            if apart_from is not None:
                known = read_records(apart_from.path / "records.parquet")
                loaded = unseen(loaded, known, data.near_duplicate_similarity)
                say(f"records: {found - len(loaded):,} of {found:,} left out, near to examples of the run's own data")
                if not loaded:
                    raise UserError("data.source: every example is in the run's own data; name another dataset")
            problems = assign_splits(
                loaded, data.validation_fraction, data.test_fraction, data.near_duplicate_similarity, self.config.seed
            )
            if held_out:
                problems = [replace(p, split="test") for p in problems]
            write_records(path / "records.parquet", problems)
            counts = {split: sum(p.split == split for p in problems) for split in ("train", "validation", "test")}
            groups = len({p.group for p in problems})
            say(f"records: {len(problems):,} examples in {groups:,} groups: {counts}")
            return {"examples": counts, "groups": groups, "left_out": found - len(loaded)}

        inputs = data.model_dump(mode="json", exclude={"context_length", "packing"})
        source_hash = _source_hash(data.path) if held_out else self.source_hash
        inputs |= {"seed": self.config.seed, "source_hash": source_hash}
        if apart_from is not None:
            inputs["apart_from"] = apart_from.path.name
        return self._stage(f"{TRANSFER if held_out else ''}records", inputs, build)

    def tokens(self, records: Stage, model: str, held_out: DataConfig | None = None) -> Stage:
        """Blocks of token sequences: `<split>-<index>.parquet`, and `spans.parquet`."""
        data = held_out or self.config.data
        tokenizer = self._tokenizer(model)
        context_length = self._context_length(self._facts(model).context_length, data)

        def build(path: Path) -> Mapping[str, Any]:
            made = tokenize(
                read_records(records.path / "records.parquet"), tokenizer, context_length, data.packing,
                self.config.capture.rows_per_shard, self.config.seed, path,
            )  # fmt: skip
            dropped, kept = made["dropped_too_long"], sum(made["examples"].values())
            if dropped > MAX_DROPPED * (dropped + kept):
                raise UserError(
                    f"data.context_length: {context_length} leaves out {dropped} of {dropped + kept} examples; raise it "
                    f"(the longest has {made['longest']} tokens), or join texts with data.packing concat"
                )
            say(f"tokens: {made['rows']}" + (f"; {dropped} longer than {context_length} left out" if dropped else ""))
            return {**made, "cost": {"tokens": sum(made["rows"].values())}}

        inputs = {
            "records": records.path.name,
            "tokenizer": fingerprint(tokenizer.backend_tokenizer.to_str()),
            "special": tokenizer.special_tokens_map,
            "context_length": context_length,
            "packing": data.packing,
            "rows_per_block": self.config.capture.rows_per_shard,
            "seed": self.config.seed,
        }
        return self._stage(f"{_kind(records)}tokens", inputs, build)

    def store(self, tokens: Stage, model: str, at: str | None = None) -> Stage:
        """The activation store, of the config's sites or of one."""
        from raysae.activations import capture
        from raysae.activations.store import Store

        c = self.config.capture
        made_with = self._fingerprint(model)
        sites = (at,) if at else self._check_sites(self._facts(model))
        settings = capture.CaptureSettings(sites, c.dtype, c.tokens_per_forward, self.config.seed)
        blocks = tokens.manifest["blocks"]

        def build(path: Path) -> Mapping[str, Any]:
            todo = [block for block in blocks if not capture.done(path, block["name"])]
            if len(todo) < len(blocks):
                say(f"capture: {len(blocks) - len(todo)} of {len(blocks)} shards are there already")
            placement = self.cluster.capture(len(todo))
            seconds = self._map_blocks(
                "capture", todo, tokens.path, path, model, _CaptureWork(path, settings), placement
            )
            manifest = capture.finish(path, blocks, settings, made_with, c.max_non_finite_fraction)
            rows = sum(manifest["rows"].values())
            held = _held(placement.workers * placement.cpus, placement.workers * placement.gpus)
            return {**manifest, "cost": {"tokens": rows, **held(seconds)}}

        inputs = {
            "tokens": tokens.path.name,
            "model": {key: value for key, value in made_with.items() if key != "name"},
            "model_dtype": self.config.model.dtype,
            "sites": sites,
            "dtype": c.dtype,
            "max_non_finite_fraction": c.max_non_finite_fraction,
            "seed": self.config.seed,
        }
        made = self._stage(f"{_kind(tokens)}store", inputs, build)
        Store(made.path).check_model(made_with)
        return made

    def saes(self, store: Stage, tokens: Stage) -> Stage:
        """The sweep: `saes/`, `history/`, `table.parquet`, `curves.parquet`, and Tune's own `tune/`."""
        from raysae.activations.store import Store

        s, t = self.config.sweep, self.config.training
        opened = Store(store.path)
        widths = {site: opened.d_model(site) for site in opened.sites}
        plan, ranges = self.points(widths), coefficients(s)[0]
        shared, common = self.recipe(), self.common(opened)

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.sweep.on_ray import PackSearch, run_sweep

            if store.reused:
                opened.verify()
            placement = self.cluster.trials()
            pack_size = self.pack_size(placement)
            search = PackSearch(plan, widths, ranges, s.seeds, common, pack_size, self.config.seed)
            trial = self._trial(path, store, tokens)
            prune = s.prune.margin if s.prune.enabled and not self.replay else None
            grace = max(s.prune.grace_fraction, t.sparsity_warmup_fraction, t.warmup_fraction)
            say(
                f"sweep: {len(plan) * len(s.seeds)} SAEs of {shared.steps * t.batch_size:,} tokens each, "
                f"{placement.workers} at once; watch: tensorboard --logdir {path / 'tune'}"
            )
            errors = run_sweep(
                search, trial, placement, self.config.cluster.max_restarts, prune,
                grace * shared.steps * t.batch_size, self.config.tracking.wandb_project,
                self.replay.stops if self.replay else {},
            )  # fmt: skip
            table = training_table(path, errors, opened.rows("train"), shared.dead_after_tokens)
            if not (table["status"] != "error").any():
                raise RuntimeError(f"every trial failed; the first: {table['status_reason'].iloc[0]}")
            table.to_parquet(path / "table.parquet", index=False)
            curves(path).to_parquet(path / "curves.parquet", index=False)
            trained = float(table["train_seconds"].sum())
            held = _held(placement.cpus, placement.gpus)(trained)
            return {"saes": len(table), "cost": {"tokens": int(table["tokens"].sum()), **held}}

        inputs = {
            "store": store.path.name,
            "sweep": s.model_dump(mode="json", exclude={"pack_size"}),
            "training": t.model_dump(mode="json"),
            "seed": self.config.seed,
        }
        if self.replay:
            inputs["replay"] = self.replay.fingerprint
        return self._stage("sweep", inputs, build)

    def nulls(self, kinds: Sequence[str], saes: Stage, store: Stage, tokens: Stage) -> Stage:
        """Nulls of these kinds, beside an SAE of each site and architecture, made from `store`: `saes/`, named in the
        manifest."""

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.activations.store import Store
            from raysae.evaluate import nulls

            spent = {"tokens": 0, "cpu_seconds": 0.0, "gpu_seconds": 0.0}

            def train(trial: Any, packs: Any) -> None:
                from raysae.sweep.on_ray import train_packs

                placement = self.cluster.trials()
                what = f"train nulls{' on shuffled rows' if trial.shuffled else ''}"
                start = perf_counter()
                train_packs(what, trial, packs, placement, self.config.cluster.max_restarts)
                at_once = min(placement.workers, len(packs))
                held = _held(placement.cpus * at_once, placement.gpus * at_once)(perf_counter() - start)
                spent.update({key: spent[key] + value for key, value in held.items()})
                spent["tokens"] += trial.recipe.steps * trial.recipe.batch_size * sum(map(len, packs.values()))

            beside, losses = nulls.peers(saes.path), self.common(Store(store.path)).losses
            trial = self._trial(path, store, tokens)
            made = nulls.build(path, kinds, beside, trial, losses, self.config.seed, train)
            for name in (name for name, found in made.items() if not found["made"]):
                say(f"nulls: the training of {name} diverged; it is left out")
            return {"nulls": made, "cost": spent}

        inputs = {"sweep": saes.path.name, "store": store.path.name, "kinds": list(kinds), "seed": self.config.seed}
        return self._stage("nulls", inputs, build)

    def _own_nulls(self, saes: Stage, store: Stage, tokens: Stage) -> Stage:
        return self.nulls([kind for kind in self.config.evaluation.nulls if kind != ELSEWHERE], saes, store, tokens)

    def _untrained_model(self, saes: Stage, tokens: Stage, model: str) -> Controls:
        """SAEs of the model with random weights: its own store, its own nulls, measured on its own activations."""
        m = self.config.model

        def build(path: Path) -> Mapping[str, Any]:
            save_with_random_weights(model, path, self.config.seed, self._revision(model), m.trust_remote_code)
            return {"of": model}

        inputs = {"model": {k: v for k, v in self._fingerprint(model).items() if k != "name"}, "seed": self.config.seed}
        null_model = str(self._stage("null_model", inputs, build).path)
        store = self.store(tokens, null_model)
        nulls = self.nulls([ELSEWHERE], saes, store, tokens)
        return Controls(nulls, store, self.evaluation("validation", None, store, tokens, null_model, nulls))

    def evaluation(
        self, split: str, saes: Stage | None, store: Stage, tokens: Stage, model: str, nulls: Stage | None = None,
        only: Sequence[str] | None = None,
    ) -> Stage:  # fmt: skip
        """Measurements on a split of every SAE and null, of some SAEs, or of nulls alone (rows only): `metrics.json`."""
        e = self.config.evaluation
        blocks = [block for block in tokens.manifest["blocks"] if block["split"] == split]

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.activations.store import Store
            from raysae.evaluate import fidelity

            opened = Store(store.path)
            placement = self.cluster.capture(len(blocks))
            fraction = min(1.0, e.max_tokens / max(sum(block["rows"] for block in blocks), 1)) if saes else 0.0
            metrics: dict[str, Any] = {}
            seconds = 0.0
            for site, members in _to_measure(saes, nulls, only).items():
                root = path / site
                task = fidelity.Measurement(
                    store.path, site, tuple(members), root, self.config.capture.tokens_per_forward, fraction
                )
                todo = [block for block in blocks if not fidelity.done(root, block["name"])]
                what = f"measure {len(members)} SAEs on {split}"
                seconds += self._map_blocks(what, todo, tokens.path, root, model, task, placement)
                names = [block["name"] for block in blocks]
                metrics |= fidelity.collect(root, names, opened.mean(site), e.bootstrap, e.confidence, self.config.seed)
            write_json(path / "metrics.json", metrics)
            held = _held(placement.workers * placement.cpus, placement.workers * placement.gpus)
            return {"metrics": metrics, "cost": {"tokens": sum(b["rows"] for b in blocks), **held(seconds)}}

        inputs = {
            "sweep": saes.path.name if saes else None,
            "nulls": nulls.path.name if nulls else None,
            "split": split,
            "only": only,
            "evaluation": e.model_dump(mode="json", exclude={"nulls", "invariance", *FEATURES}),
            "seed": self.config.seed,
        }
        if _kind(store):
            inputs["store"] = store.path.name  # not the one that the sweep is of
        return self._stage(f"{_kind(store)}evaluation", inputs, build)

    def stability(self, saes: Stage, validation: Stage, store: Stage, tokens: Stage, model: str) -> Stage:
        """Whether seeds find the same latents: `stability.json`, `stability.parquet`."""
        e, seed = self.config.evaluation, self.config.seed
        blocks = [block for block in tokens.manifest["blocks"] if block["split"] == "validation"]

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import stability

            names = [block["name"] for block in blocks]
            table, root = pd.read_parquet(saes.path / "table.parquet"), saes.path / "saes"
            seeds = stability.match_all(table, root, validation.path, names, seed)
            placement, seconds = self.cluster.capture(len(blocks)), 0.0
            for task in stability.tasks(seeds, store.path, root, path):
                todo = [block for block in blocks if not stability.done(task.root, block["name"])]
                seconds += self._map_blocks("what recurs", todo, tokens.path, task.root, model, task, placement)
            found = stability.collect(
                seeds, path, names, validation.manifest["metrics"], e.bootstrap, e.confidence, seed
            )
            stability.by_configuration(found).to_parquet(path / "stability.parquet", index=False)
            write_json(path / "stability.json", found)
            held = _held(placement.workers * placement.cpus, placement.workers * placement.gpus)
            return {"stability": found, "cost": {"tokens": sum(b["rows"] for b in blocks), **held(seconds)}}

        inputs = {"evaluation": validation.path.name, "seed": seed}
        return self._stage("stability", inputs, build)

    def domains(self, validation: Stage, tokens: Stage, records: Stage, sites: Iterable[str]) -> Stage:
        """Fidelity by domain, from the evaluation's sums: `domains.parquet`, `domains.json`."""
        e, seed = self.config.evaluation, self.config.seed

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import risk

            names = [block["name"] for block in tokens.manifest["blocks"] if block["split"] == "validation"]
            problems = [p for p in read_records(records.path / "records.parquet") if p.split == "validation"]
            roots = [validation.path / site for site in sites]
            table, facts = risk.coverage(roots, names, problems, e.bootstrap, e.confidence, seed)
            table.to_parquet(path / "domains.parquet", index=False)
            write_json(path / "domains.json", facts)
            return {}

        return self._stage("domains", {"evaluation": validation.path.name, "records": records.path.name}, build)

    def transfer(
        self, saes: Stage, validation: Stage, tokens: Stage, model: str, ids: Sequence[str], site: str,
        away: Mapping[str, tuple[Stage, Stage]],
    ) -> Stage:  # fmt: skip
        """Fidelity of some SAEs of one site on other datasets, against that on the validation split: `transfer.json`."""
        e, seed = self.config.evaluation, self.config.seed
        measured: dict[str, tuple[Stage, Stage]] = {}
        for name, (_, other_tokens) in away.items():
            say(f"transfer to {name}: {', '.join(ids)}")
            other_store = self.store(other_tokens, model, site)
            measured[name] = other_tokens, self.evaluation("test", saes, other_store, other_tokens, model, only=tuple(ids))

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import transfer

            home_names = [block["name"] for block in tokens.manifest["blocks"] if block["split"] == "validation"]
            home = (validation.path / site, home_names, validation.manifest["metrics"])
            found = {}
            for name, (other_tokens, stage_there) in measured.items():
                names = [block["name"] for block in other_tokens.manifest["blocks"]]
                there = (stage_there.path / site, names, stage_there.manifest["metrics"])
                compared = transfer.compare(ids, home, there, e.bootstrap, e.confidence, seed)
                taken = away[name][0].manifest
                found[name] = {"examples": taken["examples"]["test"], "left_out": taken["left_out"], "saes": compared}
                found[name]["over_seeds"] = transfer.over_seeds(compared)
            write_json(path / "transfer.json", found)
            return {}

        inputs = {"home": validation.path.name, "away": {name: s.path.name for name, (_, s) in measured.items()}}
        return self._stage("transfer", {**inputs, "saes": list(ids)}, build)

    def invariance(self, saes: Stage, records: Stage, tokens: Stage, model: str, sae_id: str, site: str) -> Stage:
        """Which latents of an SAE still fire when examples are worded differently: `invariance.json`."""
        e, seed = self.config.evaluation, self.config.seed
        tokenizer, context_length = self._tokenizer(model), tokens.manifest["context_length"]

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.data.perturb import kinds_for
            from raysae.evaluate import invariance

            problems = read_records(records.path / "records.parquet")
            sampled = invariance.sample([p for p in problems if p.split == "validation"], e.invariance, seed)
            made = tokenize(
                invariance.variants(sampled, problems, seed), tokenizer, context_length, "problems",
                self.config.capture.rows_per_shard, seed, path / "tokens",
            )  # fmt: skip
            task = invariance.Reading(
                site, saes.path / "saes" / sae_id, path / "latents", self.config.capture.tokens_per_forward
            )
            todo = [block for block in made["blocks"] if not invariance.done(task.root, block["name"])]
            placement = self.cluster.capture(len(todo))
            seconds = self._map_blocks("reworded examples", todo, path / "tokens", task.root, model, task, placement)
            found = invariance.collect(
                task.root,
                path / "tokens",
                made["blocks"],
                sampled,
                kinds_for(problems),
                e.bootstrap,
                e.confidence,
                seed,
            )
            write_json(path / "invariance.json", {"sae_id": sae_id, **found})
            held = _held(placement.workers * placement.cpus, placement.workers * placement.gpus)
            return {"cost": {"tokens": sum(made["rows"].values()), **held(seconds)}}

        inputs = {
            "sweep": saes.path.name, "tokens": tokens.path.name, "sae_id": sae_id, "examples": e.invariance,
            "bootstrap": e.bootstrap, "confidence": e.confidence, "seed": seed,
        }  # fmt: skip
        return self._stage("invariance", inputs, build)

    def probes(
        self, sae_id: str, site: str, saes: Stage, records: Stage, store: Stage, other: Controls | None
    ) -> Stage:
        """What can be read from an SAE's latents: `probes.parquet`, `probes.json`; other: SAEs of the untrained model."""
        p = self.config.probes

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import probes

            subject = probes.subject(store.path, site, saes.path / "saes" / sae_id)
            there = None
            if other is not None:
                null = beside(other.nulls.manifest["nulls"], ELSEWHERE, site, subject.sae.config.architecture)
                there = probes.subject(other.store.path, site, other.nulls.path / "saes" / null) if null else None
            settings = probes.Settings(**p.model_dump(exclude={"labels"}), seed=self.config.seed)
            problems = read_records(records.path / "records.parquet")
            table, found = probes.probe(subject, problems, p.labels, settings, there)
            probes.write(path, table, found, settings, sae_id=sae_id, site=site)
            return {"sae_id": sae_id, "labels": list(p.labels)}

        inputs = {
            "sweep": saes.path.name,
            "sae": sae_id,
            "records": records.path.name,
            "store": store.path.name,
            "nulls": other.nulls.path.name if other else None,
            "probes": p.model_dump(mode="json"),
            "seed": self.config.seed,
        }
        with _in_section("probes", type(p).model_fields):
            return self._stage("probes", inputs, build)

    def _check_labels(self, records: Stage) -> None:
        """Refuse labels that no problem has before anything is captured."""
        p = self.config.probes
        if p.labels:
            from raysae.evaluate import probes

            problems = [q for q in read_records(records.path / "records.parquet") if q.split == p.split]
            with _in_section("probes", type(p).model_fields):
                probes.check_labels(problems, p.labels, p.split, p.folds)

    def features(
        self, sae_id: str, site: str, saes: Stage, store: Stage, tokens: Stage, records: Stage, model: str
    ) -> Stage:
        """What each latent of an SAE fires on, over validation rows: the files of `evaluate.features`."""
        e = self.config.evaluation

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import features

            settings = features.Settings(
                e.feature_rows, e.contexts, bootstrap=e.bootstrap, confidence=e.confidence, seed=self.config.seed
            )
            decode = self._tokenizer(model).backend_tokenizer.decode
            say(f"features: {sae_id}")
            start = perf_counter()
            rows = features.build(
                path, sae_id, saes.path / "saes" / sae_id, store.path, site, "validation",
                {block["name"]: tokens.path / block["file"] for block in tokens.manifest["blocks"]},
                lambda ids: decode(ids, skip_special_tokens=False), records.path / "records.parquet", settings,
            )  # fmt: skip
            return {"cost": {"tokens": rows, **_held(torch.get_num_threads(), 0)(perf_counter() - start)}}

        inputs = {
            "sweep": saes.path.name,
            "sae": sae_id,
            "split": "validation",
            **e.model_dump(mode="json", include={"feature_rows", "contexts", "bootstrap", "confidence"}),
            "seed": self.config.seed,
        }
        return self._stage("features", inputs, build)

    # ------------------------------------------------------------------------------------------------------------------
    # What the sweep trains

    def points(self, widths: Mapping[str, int]) -> list[Proposal]:
        """The plan of the sweep over sites of these widths (d_in by site)."""
        if self.replay:
            return list(self.replay.plan)
        s = self.config.sweep
        grid = coefficients(s)[1] if s.search == "grid" else None
        return proposals(widths, s.architectures, s.expansion_factors, grid, s.samples)

    def widths(self) -> dict[str, int]:
        """d_in of each site, from the model's config alone."""
        facts = self._facts(self.config.model.name)
        return {site: facts.width(site) for site in self._check_sites(facts)}

    def recipe(self) -> Recipe:
        """How each SAE is trained."""
        t = self.config.training
        return recipe(
            t.tokens, t.batch_size, t.warmup_fraction, t.decay_fraction, t.sparsity_warmup_fraction, t.dead_after_tokens,
            t.resample_at, t.precision,
        )  # fmt: skip

    def common(self, store: Any) -> Common:
        """What its SAEs have in common; `store` tells how many labels a probe in the loss has."""
        t = self.config.training
        classes = store.label_count("train", t.losses.probe_label) if t.losses.probe > 0 else 0
        losses = Losses(**t.losses.model_dump(exclude={"probe_label"}), probe_classes=classes)
        units = "unit_norm" if self.replay else self.config.sweep.l1_units  # a replay's are converted
        return Common(t.learning_rate, t.base_learning_rate, losses, units)

    def trial(self, store: Path, shared: Recipe, rungs: int, root: Path, metadata: dict[str, Any]) -> Any:
        """What its trials share, writing below `root`."""
        from raysae.sweep.trial import Start, Trial

        t = self.config.training
        label = t.losses.probe_label if t.losses.probe > 0 else None
        start = Start(t.b_dec, t.initialisation == "rows")
        return Trial(store, shared, rungs, self.config.seed, root, metadata, start, label, t.losses.temporal > 0)

    def _trial(self, root: Path, store: Stage, tokens: Stage) -> Any:
        """The same for the SAEs and nulls of a run."""
        metadata = self._saelens_metadata(store, tokens.manifest["context_length"])
        return self.trial(store.path, self.recipe(), self.config.training.rungs, root, metadata)

    def pack_size(self, placement: Placement) -> int:
        """SAEs in a trial."""
        size = self.config.sweep.pack_size
        return size if size != "auto" else (8 if placement.gpus else 1)

    # ------------------------------------------------------------------------------------------------------------------
    # The run's directory

    def _finish(
        self, saes: Stage, validation: Stage, controlled: Sequence[Controls], records: Stage, store: Stage, tokens: Stage,
        model: str, away: Mapping[str, tuple[Stage, Stage]],
    ) -> Run:  # fmt: skip
        """Choose, measure the choice once on test, and write the run's directory; decision.json makes it a run."""
        metrics = validation.manifest["metrics"]
        table = pd.read_parquet(saes.path / "table.parquet")
        measured = pd.DataFrame({i: m for i, m in metrics.items() if not i.startswith("control-")}).T
        table = table.merge(measured.rename_axis("sae_id").reset_index(), on="sae_id", how="left")
        table = _with_last_rung(table, pd.read_parquet(saes.path / "curves.parquet"))
        nulls, controls = {}, {}
        for made, read, seen in controlled:
            for name, found in made.manifest["nulls"].items():
                nulls[name] = {**found, "store": read.path.name}
                if found["made"]:
                    m = seen.manifest["metrics"][name]
                    controls[name] = {**m, **found, "dead_fraction": m["never_fired_fraction"]}
        evidence = [self.domains(validation, tokens, records, store.manifest["sites"])]
        if len(self.config.sweep.seeds) > 1:
            evidence.append(self.stability(saes, validation, store, tokens, model))
            recurring = evidence[-1].manifest["stability"]
            table = table.merge(stability_columns(recurring), on="sae_id", how="left")
            for name in controls:  # an untrained SAE's decoder is random directions: it is as stable as the null
                controls[name] |= recurring["nulls"].get(name.removeprefix("control-untrained-"), {})
        choice = choose(table, self.gate, controls, self.waiver)
        table["pareto"] = table["sae_id"].isin(pareto_front(table[table["status"] == "completed"]))
        table["passes_gate"] = table["sae_id"].map(lambda i: i in choice.verdicts and passes(choice.verdicts[i]))
        test = None
        if choice.chosen is not None:
            tested = self.evaluation("test", saes, store, tokens, model, only=[choice.chosen])
            row = table.set_index("sae_id").loc[choice.chosen]
            kept = row[["site", "d_sae", "expansion_factor", "dead_fraction"]]
            kept = pd.concat([kept, row[[name for name in row.index if name.startswith("stability_")]]])
            test = {**kept, **tested.manifest["metrics"][choice.chosen]}
        decision = decide(self.gate, str(self.config.gate), choice, controls, test, self.waiver, self.basis)
        probed, lead = None, choice.chosen or choice.closest
        if lead is not None:
            of_lead = table.set_index("sae_id", drop=False).loc[lead]
            site = str(of_lead["site"])
            if away:
                ids = alike(table[table["status"] == "completed"], of_lead)["sae_id"]
                ids = [lead, *(str(i) for i in ids if i != lead)]
                evidence.append(self.transfer(saes, validation, tokens, model, ids, site, away))
            if self.config.evaluation.invariance:
                evidence.append(self.invariance(saes, records, tokens, model, lead, site))
            if self.config.probes.labels:
                other = controlled[1] if len(controlled) > 1 else None
                probed = self.probes(lead, site, saes, records, store, other)
        sites = table.set_index("sae_id")["site"]
        features = {
            i: self.features(i, str(sites[i]), saes, store, tokens, records, model)
            for i in self._with_features(table, decision)
        }

        directory, ledger = self.directory, self._ledger()
        directory.mkdir(parents=True, exist_ok=True)
        there = Run(directory)
        if there.report.exists() and all(s.reused for s in self.finished) and _limits(there.ledger) == _limits(ledger):
            return there
        write_json(directory / "identity.json", self.identity())
        write_atomic(directory / "config.yaml", lambda path: path.write_text(dump_yaml(self.config)))
        write_atomic(directory / "table.parquet", lambda path: table.to_parquet(path, index=False))
        write_atomic(directory / "table.csv", lambda path: table.to_csv(path, index=False))
        link_or_copy(saes.path / "curves.parquet", directory / "curves.parquet")
        for made in evidence:
            for file in sorted({*made.path.glob("*.json"), *made.path.glob("*.parquet")} - {made.path / MANIFEST}):
                link_or_copy(file, directory / file.name)
        for sae_id in table.loc[table["status"] == "completed", "sae_id"]:
            link_or_copy(saes.path / "saes" / sae_id, directory / "saes" / sae_id)
            write_json(directory / "saes" / sae_id / "metrics.json", metrics[sae_id])
        for made, _, _ in controlled:
            if (made.path / "saes").is_dir():
                link_or_copy(made.path / "saes", directory / "nulls")
        if probed is not None:
            for name in ("probes.parquet", "probes.json"):
                link_or_copy(probed.path / name, directory / "probes" / name)
        for sae_id, made in features.items():
            for name in FEATURE_FILES:
                link_or_copy(made.path / name, directory / "saes" / sae_id / "features" / name)
        (directory / "tune").unlink(missing_ok=True)
        (directory / "tune").symlink_to(Path("..") / "stages" / saes.path.name / "tune")
        write_json(directory / "store.json", {k: store.manifest[k] for k in ("model", "sites", "rows", "dtype")})
        write_json(directory / "nulls.json", nulls)
        write_json(directory / "environment.json", environment())
        write_json(directory / "ledger.json", ledger)
        write_json(directory / "decision.json", decision)
        write_report(directory)
        return Run(directory)

    def _with_features(self, table: pd.DataFrame, decision: Mapping[str, Any]) -> list[str]:
        """Ids of the SAEs whose latents are looked at."""
        which = self.config.evaluation.features
        completed = [str(i) for i in table.loc[table["status"] == "completed", "sae_id"]]
        best = decision["chosen"] or decision["closest"]
        return [i for i in completed if which == "all" or (which == "chosen" and i == best)]

    def _ledger(self) -> dict[str, Any]:
        """What each stage cost, when it was made: wall seconds, CPU- and GPU-seconds held, tokens, bytes on disk."""
        keys = ("seconds", "cpu_seconds", "gpu_seconds", "tokens", "bytes")
        stages = [
            {"stage": s.manifest["stage"], "directory": s.path.name, "reused": s.reused}
            | {key: s.manifest["cost"].get(key, 0) for key in keys}
            for s in self.finished
        ]
        total = {key: sum(s[key] for s in stages) for key in keys}
        return {"stages": stages, "total": total, "budget": spending(stages, self.config.budget.model_dump())}

    def _check_budget(self, tokens: Stage | None = None) -> None:
        """Refuse a run that is certain to ask for more than its budget: by its SAEs alone, then with its tokens too.

        What is left out is what has to be measured (device-hours, the training of the embedded model) and what is small
        (row columns, tables): `--plan` projects those. Pruning may save some, which nobody can promise.
        """
        c, limits, widths = self.config, self.config.budget.model_dump(), self.widths()
        points, seeds, shared = self.points(widths), len(c.sweep.seeds), self.recipe()
        trained = len(points) * seeds * shared.steps * shared.batch_size
        saes = sum(sae_bytes(widths[p.site], round(p.expansion_factor * widths[p.site])) for p in points) * seeds
        what = f"{len(points) * seeds} SAEs"
        if tokens is not None:
            rows = tokens.manifest["rows"]
            trained += 2 * sum(rows.values()) + rows["validation"]  # tokenized, captured, measured
            saes += activation_bytes(sum(rows.values()), list(widths.values()), c.capture.dtype)
            what += f" and the activations of {sum(rows.values()):,} tokens"
        refuse_overspending({"tokens": trained, "gigabytes": saes / 1e9}, limits, what)

    @cached_property
    def directory(self) -> Path:
        """`<output>/<run>`."""
        c = self.config
        name = c.run or f"{Path(c.model.name).name}-{c.data.source}-{fingerprint(self.identity(), 8)}"
        return self.root / name

    def identity(self) -> dict[str, Any]:
        """What the run's results depend on: its config but for where it runs, and what gate, waiver and basis say."""
        waiver = self.waiver.model_dump(mode="json") if self.waiver else None
        content = {"gate": self.gate.model_dump(mode="json"), "waiver": waiver, "basis": self.basis}
        return {**self.config.identity(), **content}

    def _check_run(self) -> None:
        """Refuse a run directory that belongs to another config."""
        file = self.directory / "identity.json"
        if file.exists():
            if read_json(file) != self.identity():
                raise UserError(
                    f"run: {self.directory} belongs to another config or gate; give another --run, or leave it unset"
                )
        elif self.directory.exists() and any(self.directory.iterdir()):
            raise UserError(f"run: {self.directory} is not empty and no run of raysae; give another --run")

    # ------------------------------------------------------------------------------------------------------------------
    # Parts of stages

    def _stage(self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> Stage:
        version = STAGE_VERSIONS[name if name in STAGE_VERSIONS else name.removeprefix(TRANSFER)]
        inputs = {"version": version, **inputs}
        made = (
            finished_stage(self.root, name, inputs) if self._only_find else stage(self.root, name, inputs, build, say)
        )
        self.finished.append(made)
        return made

    @property
    def cluster(self) -> Cluster:
        """The Ray cluster, joined or started when a stage first needs it."""
        if self._cluster is None:
            self._cluster = connect(self.config.cluster)
            c = self._cluster
            say(f"Ray: {c.cpus:g} CPUs, {c.gpus} GPUs; dashboard {c.dashboard or 'off'}")
        return self._cluster

    def _map_blocks(
        self, what: str, blocks: list, tokens: Path, root: Path, model: str, work: Any, placement: Placement
    ) -> float:
        from raysae.activations.on_ray import map_blocks

        m = self.config.model
        loading = {
            "name": model, "revision": self._revision(model), "dtype": m.dtype, "trust_remote_code": m.trust_remote_code
        }  # fmt: skip
        start = perf_counter()
        map_blocks(what, blocks, tokens, root, loading, work, placement, self.config.cluster.max_restarts)
        return perf_counter() - start

    def _fingerprint(self, model: str) -> dict[str, str | None]:
        if model not in self._fingerprints:
            m = self.config.model
            self._fingerprints[model] = fingerprint_of(model, self._revision(model), m.trust_remote_code)
        return self._fingerprints[model]

    def _revision(self, model: str) -> str | None:
        """The config's, which is of its own model; models that a stage made are folders."""
        return self.config.model.revision if model == self.config.model.name else None

    def _facts(self, model: str) -> ModelFacts:
        m = self.config.model
        own = model == "embedded"
        facts = embedded_facts() if own else model_facts(model, self._revision(model), m.trust_remote_code)
        self._context_length(facts.context_length)
        return facts

    def _held_out(self, model: str, own: Stage) -> dict[str, tuple[Stage, Stage]]:
        """Records and tokens of each dataset to transfer to: what is wrong with one shows before anything is captured."""
        made = {}
        for name, data in self.config.transfer.items():
            say(f"transfer to {name}")
            try:
                records = self.records(data, own)
                made[name] = records, self.tokens(records, model, data)
            except UserError as error:
                words = str(error)
                where = f"transfer.{name}"
                raise UserError(
                    words.replace("data", where, 1) if words.startswith("data.") else f"{where}: {words}"
                ) from None
        return made

    def _context_length(self, allowed: int | None, data: DataConfig | None = None) -> int:
        """The data's context length, checked against the model's; unset, the model's up to CONTEXT_AT_MOST."""
        asked = (data or self.config.data).context_length
        if asked is None:
            return min(allowed or CONTEXT_AT_MOST, CONTEXT_AT_MOST)
        if allowed is not None and asked > allowed:
            raise UserError(f"data.context_length: {asked} is longer than the model allows ({allowed} positions)")
        return asked

    def _check_sites(self, facts: ModelFacts) -> tuple[str, ...]:
        """The sites to capture, checked against the model, in order of computation."""
        wanted = self.config.capture.sites or (default_site(self.config.model.name, facts.n_blocks),)
        return tuple(site.name for site in order_sites(wanted, facts.n_blocks))

    def _tokenizer(self, model: str) -> PreTrainedTokenizerBase:
        m = self.config.model
        if m.tokenizer is not None:
            return load_tokenizer(m.tokenizer, None, m.trust_remote_code)
        if model == "embedded":
            return build_tokenizer()
        return load_tokenizer(model, m.revision, m.trust_remote_code)

    @cached_property
    def source_hash(self) -> str | None:
        """Of the run's own data."""
        return _source_hash(self.config.data.path)

    def _saelens_metadata(self, store: Stage, context_length: int) -> dict[str, Any]:
        return {
            "model_name": self.config.model.name,
            "model_class_name": "AutoModelForCausalLM",
            "context_size": context_length,
            "prepend_bos": True,
            "exclude_special_tokens": True,
            "dataset_path": self.config.data.path or self.config.data.source,
            "raysae_version": __version__,
            "raysae_store": store.path.name,
        }


class _CaptureWork:
    """`capture_block` with its settings, as the pool of hosts wants it."""

    def __init__(self, root: Path, settings: Any) -> None:
        self.root, self.settings = root, settings

    def __call__(self, host: Any, block: Any) -> Mapping[str, Any]:
        from raysae.activations.capture import capture_block

        return capture_block(host, block, self.root, self.settings)


def _with_last_rung(table: pd.DataFrame, rungs: pd.DataFrame) -> pd.DataFrame:
    """FVU and L0 of SAEs that were stopped early, from their last rung (a validation sample, no interval)."""
    last = rungs.groupby("sae_id").tail(1).set_index("sae_id")
    for column in ("fvu", "l0"):
        table[column] = table[column].astype(float).fillna(table["sae_id"].map(last[column]))
    return table


def _to_measure(saes: Stage | None, nulls: Stage | None, only: Sequence[str] | None) -> dict[str, list[tuple[str, Path]]]:
    """(id, directory) of the SAEs to measure by site: some of a sweep, or all that finished, and the nulls."""
    wanted: dict[str, list[tuple[str, Path]]] = {}
    if saes is not None:
        table = pd.read_parquet(saes.path / "table.parquet")
        table = table[table["status"] == "completed"]
        for row in (table if only is None else table[table["sae_id"].isin(only)]).itertuples():
            wanted.setdefault(str(row.site), []).append((str(row.sae_id), saes.path / "saes" / str(row.sae_id)))
    if nulls is not None:
        for name, found in nulls.manifest["nulls"].items():
            if found["made"]:
                wanted.setdefault(found["site"], []).append((name, nulls.path / "saes" / name))
    return wanted


@contextmanager
def _in_section(section: str, fields: Iterable[str]) -> Iterator[None]:
    """A mistake in one of these fields is named with its section: `labels: ...` becomes `probes.labels: ...`."""
    try:
        yield
    except UserError as error:
        inside = str(error).partition(":")[0] in fields
        raise UserError(f"{section}.{error}" if inside else str(error)) from None


def _kind(made: Stage) -> str:
    """TRANSFER for a stage of a held-out dataset, and for those after it; else nothing."""
    return TRANSFER if made.manifest["stage"].startswith(TRANSFER) else ""


def _source_hash(given: str | None) -> str | None:
    """Hash of a local source's bytes: the same path with other content is another dataset."""
    path = Path(given) if given else None
    if path is None or not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return fingerprint([(p.name, sha256_of(p)) for p in files])


def coefficients(sweep: SweepConfig) -> tuple[dict[str, tuple[float, float]], dict[str, Sequence[float]]]:
    """(ranges for Optuna, values of a grid) of the sparsity coefficient, by architecture."""
    ranges: dict[str, tuple[float, float]] = {
        "l1_coefficient": sweep.l1_range,
        "k": sweep.k_range,
        "target_l0": sweep.target_l0_range,
        "l0_coefficient": sweep.l0_range,
    }
    values: dict[str, Sequence[float]] = {
        "l1_coefficient": sweep.l1_coefficients,
        "k": sweep.k,
        "target_l0": sweep.target_l0,
        "l0_coefficient": sweep.l0_coefficients,
    }
    return (
        {a: sweep.ranges.get(a, ranges[COEFFICIENT[a]]) for a in sweep.architectures},
        {a: sweep.coefficients.get(a, values[COEFFICIENT[a]]) for a in sweep.architectures},
    )


def _limits(ledger: Mapping[str, Any]) -> list[float | None]:
    """The budget that a ledger was held against."""
    budget = ledger.get("budget") or {}
    return [budget.get(item, {}).get("limit") for item in ITEMS]


def _held(cpus: float, gpus: float) -> Callable[[float], dict[str, float]]:
    """Device-seconds held during so many wall seconds."""
    return lambda seconds: {"cpu_seconds": seconds * cpus, "gpu_seconds": seconds * gpus}
