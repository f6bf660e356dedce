"""The stages of the flow, from records to measurements: each a method from earlier stages to a finished directory.

A stage's work is a plain function elsewhere; here it is named by what goes in (`artifacts.stage`), placed and counted. Ray
is started only if a stage has work for it.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from raysae import __version__
from raysae.artifacts import FAILED, Stage, fingerprint, finished_stage, stage
from raysae.config import DataConfig, SweepConfig, SweepJob
from raysae.data.duplicates import near_duplicates
from raysae.data.records import read_records, write_records
from raysae.data.sources import GSM8K_HUB, LeftOut, load_problems
from raysae.data.splits import assign_splits, unseen
from raysae.data.tokens import tokenize
from raysae.errors import Fault, UserError
from raysae.evaluate.statistics import Bootstrap
from raysae.files import output_root, read_table, sha256_of, write_atomic, write_json
from raysae.models.embedded import build_tokenizer, embedded_facts, train_embedded
from raysae.models.foreign import saelens_hooks
from raysae.models.host import ModelFacts, fingerprint_of, load_tokenizer, model_facts
from raysae.models.registry import default_site
from raysae.models.sites import order_sites
from raysae.placement import Placement, pack_size
from raysae.progress import Progress, say
from raysae.sae.conventions import L1_UNITS
from raysae.sae.losses import Losses
from raysae.sae.train import Recipe
from raysae.sweep.collect import asked, curves, ended, training_table
from raysae.sweep.replay import Replay
from raysae.sweep.space import COEFFICIENT, Common, Proposal, check_space, proposals, recipe, width

if TYPE_CHECKING:
    from raysae.on_ray.cluster import Cluster

STAGE_VERSIONS = {
    "model": 1, "records": 2, "tokens": 2, "store": 2, "sweep": 8, "nulls": 3, "null_model": 1, "evaluation": 6,
    "stability": 3, "domains": 3, "transfer": 2, "invariance": 2, "probes": 2, "features": 2,
}  # fmt: skip
"""Raised when a stage's code changes what it makes, so that what an older raysae made is not taken for it."""

TRANSFER = "transfer_"
"""Before the name of a stage: it is of another dataset than the run's, all of it held out. The code is the same."""

NOT_MEASURED_BY = {"nulls", "invariance", "features", "feature_rows", "contexts"}
"""Fields of the evaluation that the evaluation stage does not depend on: they have stages of their own."""

CONTEXT_AT_MOST = 512
"""Context length where neither the config nor the model asks for less."""
LONG_TO_READ = 10**10
"""Bytes from which a line says that a stage is being compared with its hashes, at about a gigabyte a second and core."""
FAR = 3.0
"""‖mean‖ over √E‖x - mean‖² of activations, from which the log speaks of it."""
MAX_DROPPED = 0.5
"""Share of examples that may be too long for the context before that is the user's mistake."""


class Stages:
    """The stages of one job. Each is a method that returns its finished `Stage`.

    With a `replay` the sweep trains its points, and stops SAEs where it says, in place of searching and pruning.
    """

    def __init__(self, config: SweepJob, replay: Replay | None = None) -> None:
        self.config, self.replay = config, replay
        self.root = output_root(config.output, given="output" in config.model_fields_set)
        self.finished: list[Stage] = []
        self._cluster: Cluster | None = None
        self._only_find = False
        self._verified: set[Path] = set()
        self.cut: list[str] = []
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

    @property
    def bootstrap(self) -> Bootstrap:
        """Behind every interval."""
        e = self.config.evaluation
        return Bootstrap(e.bootstrap, e.confidence, self.config.seed)

    def close(self) -> None:
        if self._cluster is not None:
            from raysae.on_ray.cluster import disconnect

            disconnect(self._cluster)

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
                "cost": {"tokens": made["tokens"], **of_driver(made["seconds"])},
            }

        return str(self._stage("model", {"embedded": True, "seed": self.config.seed}, build).path)

    def records(self, held_out: DataConfig | None = None, apart_from: Stage | None = None) -> Stage:
        """Examples with their splits: `records.parquet`. Of the run's data; or of a held-out dataset, whole but for what
        is near to an example of the records `apart_from`."""
        data = held_out or self.config.data

        def build(path: Path) -> Mapping[str, Any]:
            left_out = LeftOut(skip=data.on_bad_row == "skip")
            loaded = load_problems(
                data.source, data.path, data.subset, data.hub_split, data.columns.model_dump(), data.text_separator,
                data.text_replace, data.examples, self.config.seed, left_out=left_out,
            )  # fmt: skip
            for line in left_out.lines():
                say(f"records: {line}")
            found = len(loaded)
            if apart_from is not None:
                known = read_records(apart_from.path / "records.parquet")
                loaded = unseen(loaded, known, data.near_duplicate_similarity)
                say(f"records: {found - len(loaded):,} of {found:,} left out, near to examples of the run's own data")
                if not loaded:
                    raise UserError("data.source: every example is in the run's own data; name another dataset")
            similarity = data.near_duplicate_similarity
            near = None if similarity is None else near_duplicates([p.question for p in loaded], similarity)
            problems = assign_splits(loaded, data.validation_fraction, data.test_fraction, near, self.config.seed)
            if held_out:
                problems = [replace(p, split="test") for p in problems]
            write_records(path / "records.parquet", problems)
            counts = {split: sum(p.split == split for p in problems) for split in ("train", "validation", "test")}
            groups = len({p.group for p in problems})
            say(f"records: {len(problems):,} examples in {groups:,} groups: {counts}")
            short = None if near is None else near.short / len(problems)
            if short:
                say(f"records: {short:.1%} of the texts are shorter than a shingle; only equal ones unite")
            rows = {"bad_rows": len(left_out.bad), "blank_rows": left_out.blank, "not_compared": short}
            return {"examples": counts, "groups": groups, "left_out": found - len(loaded), **rows}

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
            lost = {f"examples longer than {context_length}": dropped, "examples without a row": made["dropped_empty"]}
            lost["tokens at which a text was cut, no rows"] = made["cut_starts"]
            said = "".join(f"; left out: {count:,} {what}" for what, count in lost.items() if count)
            say(f"tokens: {made['rows']}{said}")
            lost |= {"bad rows": records.manifest["bad_rows"], "rows without text": records.manifest["blank_rows"]}
            made["left_out"] = {what: count for what, count in lost.items() if count}
            made["not_compared"] = records.manifest["not_compared"]
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
        made = self._stage(f"{kind_of(records)}tokens", inputs, build)
        largest, rows = made.manifest["largest_id"], self._facts(model).vocab_size
        if largest >= rows:
            name = self.config.model.tokenizer or model
            raise UserError(
                f"model.tokenizer: {name!r} makes token {largest}, but the model's embedding has {rows} rows; name the "
                "model's own tokenizer"
            )
        return made

    def store(self, tokens: Stage, model: str, at: str | None = None) -> Stage:
        """The activation store, of the config's sites or of one."""
        from raysae.activations import capture
        from raysae.activations.store import Store

        c = self.config.capture
        made_with = self._fingerprint(model)
        sites = (at,) if at else self._check_sites(self._facts(model))
        settings = capture.CaptureSettings(sites, c.dtype, c.tokens_per_forward, self.config.seed, c.max_norm_ratio)
        blocks = tokens.manifest["blocks"]

        def build(path: Path) -> Mapping[str, Any]:
            work = {"capture": capture.Capture(path, settings)}
            cost = self._over_blocks(work, blocks, capture.done, tokens.path, model)
            manifest = capture.finish(path, blocks, settings, made_with, c.max_non_finite_fraction)
            lost = {f"rows of more than {c.max_norm_ratio or 0:g} times the median norm": manifest["norm_outliers"]}
            lost["rows with NaN or inf"] = next(iter(manifest["sites"].values()))["non_finite"]
            lost = {what: count for what, count in lost.items() if count}
            for what, count in lost.items():
                say(f"capture: left out: {count:,} {what}")
            manifest["left_out"] = {**tokens.manifest["left_out"], **lost}
            manifest["not_compared"] = tokens.manifest["not_compared"]
            return {**manifest, "cost": {"tokens": sum(manifest["rows"].values()), **cost}}

        inputs = {
            "tokens": tokens.path.name,
            "model": {key: value for key, value in made_with.items() if key != "name"},
            "model_dtype": self.config.model.dtype,
            "sites": sites,
            "dtype": c.dtype,
            "max_non_finite_fraction": c.max_non_finite_fraction,
            "max_norm_ratio": c.max_norm_ratio,
            "seed": self.config.seed,
        }
        made = self._stage(f"{kind_of(tokens)}store", inputs, build)
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
        tokens_each = shared.steps * shared.batch_size

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.on_ray.tune import run_sweep
            from raysae.sweep.prune import Pruning
            from raysae.sweep.search import PackSearch

            placement = self.cluster.trials()
            together = self.pack_size(placement)
            for line in [*self.cut, *far_from_zero(common.offsets)]:
                say(line)
            there = ended(path, tokens_each)
            if there:
                say(f"sweep: {len(there)} SAEs are there already")
            search = PackSearch(plan, widths, ranges, s.seeds, common, together, self.config.seed, path, there)
            trial = self._trial(path, store, tokens)
            prune = s.prune.margin if s.prune.enabled and not self.replay else None
            grace = max(s.prune.grace_fraction, t.sparsity_warmup_fraction, t.warmup_fraction)
            packed = f"in packs of {together}, " if together > 1 else ""
            say(
                f"sweep: {len(plan) * len(s.seeds)} SAEs of {tokens_each:,} tokens each, {packed}"
                f"{placement.workers} at once; watch: tensorboard --logdir {path / 'tune'}"
            )
            pruning = Pruning(prune, grace * tokens_each, self.replay.stops if self.replay else {})
            cluster, project = self.config.cluster, self.config.tracking.wandb_project
            errors = run_sweep(search, trial, pruning, placement, cluster.max_restarts, project)
            ids = asked(plan, widths, s.seeds, common, path)
            if ids is None:
                raise Fault("sweep: it ended before every SAE was proposed; the same command goes on from here")
            table = training_table(path, errors, ids, tokens_each, opened.rows("train"), shared.dead_after_tokens)
            if not (table["status"] != "error").any():
                raise Fault(f"sweep: every trial failed; the first: {table['status_reason'].iloc[0]}")
            failed = table[table["status"] == "error"].set_index("sae_id")["status_reason"].to_dict()
            if failed:
                say(f"sweep: {len(failed)} of {len(ids)} SAEs failed; the run goes on without, a rerun tries them again")
            else:
                shutil.rmtree(path / "state", ignore_errors=True)
            rungs = curves(path)  # by rename: a run may hold links to what was here when SAEs of it had failed
            write_atomic(path / "table.parquet", lambda file: table.to_parquet(file, index=False))
            write_atomic(path / "curves.parquet", lambda file: rungs.to_parquet(file, index=False))
            trained = float(table["train_seconds"].sum())
            return {
                "saes": len(table),
                FAILED: failed,
                "cost": {"tokens": int(table["tokens"].sum()), **replace(placement, workers=1).held(trained)},
            }

        inputs = {
            "store": store.path.name,
            "sweep": s.model_dump(mode="json", exclude={"pack_size"}),
            "training": t.model_dump(mode="json"),
            "seed": self.config.seed,
        }
        if self.replay:
            inputs["replay"] = self.replay.fingerprint
        return self._stage("sweep", inputs, build)

    def evaluation(
        self, split: str, saes: Stage | None, store: Stage, tokens: Stage, model: str, nulls: Stage | None = None,
        only: Sequence[str] | None = None,
    ) -> Stage:  # fmt: skip
        """Measurements on a split of every SAE and null, of those that `only` names, or of nulls alone (rows only):
        `metrics.json`."""
        e = self.config.evaluation
        blocks = blocks_of(tokens, split)

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.activations.store import Store
            from raysae.evaluate import fidelity

            opened = Store(store.path)
            fraction = min(1.0, e.max_tokens / max(sum(block["rows"] for block in blocks), 1)) if saes else 0.0
            works = {
                f"measure {len(members)} SAEs of {site} on {split}": fidelity.Measurement(
                    store.path, site, tuple(members), path / site, self.config.capture.tokens_per_forward, fraction
                )
                for site, members in _to_measure(saes, nulls, only).items()
            }
            cost = self._over_blocks(works, blocks, fidelity.done, tokens.path, model)
            metrics: dict[str, Any] = {}
            asked_of = [sae_id for work in works.values() for sae_id, _ in work.saes]
            for work in works.values():
                mean = opened.mean(work.site)
                metrics |= fidelity.collect(work.root, names_of(blocks), mean, self.bootstrap)
            refuse_partial(f"measurements on {split}", asked_of, metrics)
            write_json(path / "metrics.json", metrics)
            return {"metrics": metrics, "cost": {"tokens": sum(b["rows"] for b in blocks), **cost}}

        inputs = {
            "sweep": saes.key if saes else None,
            "nulls": nulls.path.name if nulls else None,
            "split": split,
            "only": only,
            "evaluation": e.model_dump(mode="json", exclude=NOT_MEASURED_BY),
            "seed": self.config.seed,
        }
        if kind_of(store):
            inputs["store"] = store.path.name  # not the one that the sweep is of
        return self._stage(f"{kind_of(store)}evaluation", inputs, build)

    # ------------------------------------------------------------------------------------------------------------------
    # What the sweep trains

    def points(self, widths: Mapping[str, int]) -> list[Proposal]:
        """The plan of the sweep over sites of these widths (d_in by site)."""
        if self.replay:
            return list(self.replay.plan)
        s = self.config.sweep
        grid = coefficients(s)[1] if s.search == "grid" else None
        self.cut = check_space(
            widths, s.architectures, s.expansion_factors, _stated(s), s.samples if grid is None else None
        )
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
        offsets = {site: store.offset(site) for site in store.sites}
        return Common(t.learning_rate, t.base_learning_rate, losses, units, offsets)

    def trial(self, store: Path, shared: Recipe, rungs: int, root: Path, metadata: dict[str, Any]) -> Any:
        """What its trials share, writing below `root`."""
        from raysae.activations.store import Store
        from raysae.sweep.trial import Start, Trial

        t = self.config.training
        label = t.losses.probe_label if t.losses.probe > 0 else None
        start = Start(t.b_dec, t.initialisation == "rows")
        return Trial(Store(store), shared, rungs, self.config.seed, root, metadata, start, label, t.losses.temporal > 0)

    def _trial(self, root: Path, store: Stage, tokens: Stage) -> Any:
        """The same for the SAEs and nulls of a run."""
        metadata = self._saelens_metadata(store, tokens)
        trial = self.trial(store.path, self.recipe(), self.config.training.rungs, root, metadata)
        return replace(trial, hooks=self._saelens_hooks(store))

    def pack_size(self, placement: Placement) -> int:
        """SAEs in a trial: see `placement.pack_size`."""
        size = self.config.sweep.pack_size
        if size != "auto" or not placement.gpus:
            return 1 if size == "auto" else size
        widths = self.widths()
        points = self.points(widths)
        at = Counter(point.site for point in points)
        d_in, d_sae = max((widths[p.site], width(p.expansion_factor, widths[p.site])) for p in points)
        saes = [n * len(self.config.sweep.seeds) for n in at.values()]
        return pack_size(saes, placement, d_in, d_sae, self.config.training.batch_size, self.cluster.device_bytes)

    # ------------------------------------------------------------------------------------------------------------------
    # Parts of stages

    def _stage(self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> Stage:
        version = STAGE_VERSIONS[name if name in STAGE_VERSIONS else name.removeprefix(TRANSFER)]
        inputs = {"version": version, **inputs}

        def from_intact(path: Path) -> Mapping[str, Any]:
            self.verify()
            return build(path)

        made = (
            finished_stage(self.root, name, inputs)
            if self._only_find
            else stage(self.root, name, inputs, from_intact, say)
        )
        self.finished.append(made)
        if self.config.verify:
            self.verify()
        return made

    def verify(self) -> None:
        """Compare every file of the reused stages so far with its sha256, once: what is new is made from them."""
        for made in self.finished:
            if made.reused and made.path not in self._verified:
                if made.manifest["cost"]["bytes"] > LONG_TO_READ:
                    say(f"verifying {made.path.name}")
                made.verify()
                self._verified.add(made.path)

    @property
    def cluster(self) -> Cluster:
        """The Ray cluster, joined or started when a stage first needs it."""
        if self._cluster is None:
            from raysae.on_ray.cluster import connect

            self._cluster = connect(self.config.cluster)
            c = self._cluster
            say(f"Ray: {c.cpus:g} CPUs, {c.gpus} GPUs; dashboard {c.dashboard or 'off'}")
        return self._cluster

    def _over_blocks(
        self,
        works: Mapping[str, Any],
        blocks: Sequence[dict],
        done: Callable[[Path, str], bool],
        tokens: Path,
        model: str,
    ) -> dict[str, float]:
        """Do each work, by what it is called, on the blocks that are not done below its `root`. Returns what it cost."""
        cost = {"cpu_seconds": 0.0, "gpu_seconds": 0.0}
        for what, work in works.items():
            todo = [block for block in blocks if not done(work.root, block["name"])]
            if len(todo) < len(blocks):
                say(f"{what}: {len(blocks) - len(todo)} of {len(blocks)} shards are there already")
            placement = self.cluster.capture(len(todo))
            seconds = self._map_blocks(what, todo, tokens, work.root, model, work, placement)
            refuse_partial(what, names_of(blocks), [name for name in names_of(blocks) if done(work.root, name)])
            for key, value in placement.held(seconds).items():
                cost[key] += value
        return cost

    def _map_blocks(
        self, what: str, blocks: list, tokens: Path, root: Path, model: str, work: Any, placement: Placement
    ) -> float:
        from raysae.on_ray.hosts import map_blocks

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
        names = tuple(site.name for site in order_sites(wanted, facts.n_blocks))
        for name in names:
            facts.width(name)  # refuses one that only other architectures have
        return names

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

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """Hashes of what the config names: the same paths with other content are another run. By the fields' names."""
        name = self.config.model.name
        found: dict[str, Any] = {"data.path": self.source_hash}
        if name != "embedded":
            found["model.name"] = {key: value for key, value in self._fingerprint(name).items() if key != "name"}
        if name != "embedded" or self.config.model.tokenizer:
            found["model.tokenizer"] = fingerprint(self._tokenizer(name).backend_tokenizer.to_str())
        for other, data in self.config.transfer.items():
            found[f"transfer.{other}.path"] = _source_hash(data.path)
        return found

    def _saelens_metadata(self, store: Stage, tokens: Stage) -> dict[str, Any]:
        """What SAELens needs to run an SAE's model, and nothing of this machine: a model or dataset that is not on the hub
        has no name here. `raysae_model` identifies it by its weights."""
        d, model = self.config.data, store.manifest["model"]
        data = (GSM8K_HUB[0] if d.source == "gsm8k" else None) if d.path is None else d.path
        return {
            "model_name": model["name"] if model["revision"] is not None else None,
            "context_size": tokens.manifest["context_length"],
            "prepend_bos": tokens.manifest["separator_id"] is not None,
            "exclude_special_tokens": True,
            "dataset_path": data if self.source_hash is None else None,
            "raysae_version": __version__,
            "raysae_store": store.path.name,
            "raysae_model": {key: value for key, value in model.items() if key != "name"},
        }

    def _saelens_hooks(self, store: Stage) -> dict[str, dict[str, Any]]:
        """By site: the class that SAELens loads the model with, as what, and where it reads."""
        m, model = self.config.model, store.manifest["model"]
        found = saelens_hooks(
            model["name"], tuple(store.manifest["sites"]), self._revision(model["name"]), m.trust_remote_code
        )
        as_published: dict[str, Any] = {"dtype": m.dtype, "center_writing_weights": False}
        as_loaded: dict[str, Any] = {"dtype": m.dtype}
        if model["revision"] is not None:
            as_loaded["revision"] = model["revision"]
        if m.trust_remote_code:
            as_loaded["trust_remote_code"] = True
        loading = {"HookedTransformer": as_published, "AutoModelForCausalLM": as_loaded}
        return {
            site: {**hook._asdict(), "model_from_pretrained_kwargs": loading[hook.model_class_name]}
            for site, hook in found.items()
        }


def _to_measure(
    saes: Stage | None, nulls: Stage | None, only: Sequence[str] | None
) -> dict[str, list[tuple[str, Path]]]:
    """(id, directory) of the SAEs and nulls to measure, by site: all that finished, or those that `only` names."""
    wanted: dict[str, list[tuple[str, Path]]] = {}
    if saes is not None:
        table = read_table(saes.path / "table.parquet")
        table = table[table["status"] == "completed"]
        for row in (table if only is None else table[table["sae_id"].isin(only)]).itertuples():
            wanted.setdefault(str(row.site), []).append((str(row.sae_id), saes.path / "saes" / str(row.sae_id)))
    if nulls is not None:
        for name, found in nulls.manifest["nulls"].items():
            if found["made"] and (only is None or name in only):
                wanted.setdefault(found["site"], []).append((name, nulls.path / "saes" / name))
    return wanted


def metrics_of(measured: Stage) -> dict[str, dict[str, Any]]:
    """What an evaluation measured, by id; NaN again where its manifest says null."""
    found = measured.manifest["metrics"]
    return {i: {name: math.nan if value is None else value for name, value in m.items()} for i, m in found.items()}


def refuse_partial(what: str, asked: Sequence[str], there: Collection[str]) -> None:
    """Raise Fault unless all that was asked of a part of a stage is there: a stage is whole, or is not finished."""
    absent = [name for name in asked if name not in there]
    if absent:
        raise Fault(
            f"{what}: {len(absent)} of {len(asked)} are not there, such as {absent[0]}; the same command goes on from here"
        )


def kind_of(made: Stage) -> str:
    """TRANSFER for a stage of a held-out dataset, and for those after it; else nothing."""
    return TRANSFER if made.manifest["stage"].startswith(TRANSFER) else ""


def blocks_of(tokens: Stage, split: str) -> list[dict]:
    """Entries of a split's blocks in the token manifest."""
    return [block for block in tokens.manifest["blocks"] if block["split"] == split]


def names_of(blocks: Sequence[dict]) -> list[str]:
    """The blocks' names, which are their shards' too."""
    return [block["name"] for block in blocks]


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


def far_from_zero(offsets: Mapping[str, float]) -> list[str]:
    """What to say of sites whose mean outweighs what varies about it, by their `Store.offset`."""
    ratios = {site: math.sqrt(max(offset**2 - 1, 0.0)) for site, offset in offsets.items()}
    return [
        f"sweep: {site}: the norm of the mean activation is {ratio:.3g} times what varies about it; b_dec takes it, and "
        "inputs are scaled by what varies"
        for site, ratio in ratios.items()
        if ratio > FAR
    ]


def _stated(sweep: SweepConfig) -> dict[str, tuple[str, Sequence[float]]]:
    """By architecture, the field that states its coefficients in this search, and what it states."""
    grid = sweep.search == "grid"
    own, values = (sweep.coefficients, coefficients(sweep)[1]) if grid else (sweep.ranges, coefficients(sweep)[0])
    fields = {
        "l1_coefficient": ("l1_coefficients", "l1_range"),
        "k": ("k", "k_range"),
        "target_l0": ("target_l0", "target_l0_range"),
        "l0_coefficient": ("l0_coefficients", "l0_range"),
    }
    shared = {a: fields[COEFFICIENT[a]][0 if grid else 1] for a in sweep.architectures}
    named = {a: f"{'coefficients' if grid else 'ranges'}.{a}" if a in own else shared[a] for a in sweep.architectures}
    return {a: (named[a], values[a]) for a in sweep.architectures}


def of_driver(seconds: float) -> dict[str, float]:
    """Device-seconds of work in the driver, on all of torch's threads."""
    threads = torch.get_num_threads()
    return Placement(1, threads, 0.0, threads).held(seconds)
