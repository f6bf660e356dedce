"""The stages of evidence: what an SAE must beat, whether seeds and datasets agree, and what its latents say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from raysae.artifacts import Stage
from raysae.data.records import read_records
from raysae.errors import UserError
from raysae.evaluate.nulls import ELSEWHERE, beside
from raysae.files import read_table, write_json
from raysae.models.host import save_with_random_weights
from raysae.progress import say
from raysae.stages import Stages, blocks_of, metrics_of, names_of, of_driver


class Controls(NamedTuple):
    """Nulls, the store of the model that they read, and their measurements on it."""

    nulls: Stage
    store: Stage
    measured: Stage
    model: str = ""
    """Name or path of the model."""


class Evidence(Stages):
    """Stages beside the SAEs and after their measurement."""

    def nulls(self, kinds: Sequence[str], saes: Stage, store: Stage, tokens: Stage) -> Stage:
        """Nulls of these kinds, beside the SAEs that they are compared with, made from `store`: `saes/`, named in the
        manifest."""

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.activations.store import Store
            from raysae.evaluate import nulls

            spent = {"tokens": 0, "cpu_seconds": 0.0, "gpu_seconds": 0.0}
            begun, trained = perf_counter(), [0.0]

            def train(trial: Any, packs: Any) -> None:
                from raysae.on_ray.tune import train_packs

                placement = self.cluster.trials()
                what = f"train nulls{' on shuffled rows' if trial.shuffled else ''}"
                start = perf_counter()
                train_packs(what, trial, packs, placement, self.config.cluster.max_restarts)
                trained.append(perf_counter() - start)
                at_once = replace(placement, workers=min(placement.workers, len(packs)))
                for key, value in at_once.held(trained[-1]).items():
                    spent[key] += value
                spent["tokens"] += trial.recipe.steps * trial.recipe.batch_size * sum(map(len, packs.values()))

            say(f"nulls: {', '.join(kinds)}")
            beside, losses = nulls.peers(saes.path), self.common(Store(store.path)).losses
            trial = self._trial(path, store, tokens)
            made = nulls.build(path, kinds, beside, trial, losses, self.config.seed, train)
            for key, value in of_driver(perf_counter() - begun - sum(trained)).items():
                spent[key] += value
            for name in (name for name, found in made.items() if not found["made"]):
                say(f"nulls: the training of {name} diverged; it is left out")
            return {"nulls": made, "cost": spent}

        inputs = {"sweep": saes.key, "store": store.path.name, "kinds": list(kinds), "seed": self.config.seed}
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
        measured = self.evaluation("validation", None, store, tokens, null_model, nulls)
        return Controls(nulls, store, measured, null_model)

    def stability(self, saes: Stage, validation: Stage, store: Stage, tokens: Stage, model: str) -> Stage:
        """Whether seeds find the same latents: `stability.json`, `stability.parquet`."""
        seed = self.config.seed
        blocks = blocks_of(tokens, "validation")

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import stability

            names = names_of(blocks)
            table, root = read_table(saes.path / "table.parquet"), saes.path / "saes"
            seeds = stability.match_all(table, root, validation.path, names, seed)
            works = {f"what recurs at {task.site}": task for task in stability.tasks(seeds, store.path, root, path)}
            cost = self._over_blocks(works, blocks, stability.done, tokens.path, model)
            found = stability.collect(path, names, table, metrics_of(validation), self.bootstrap)
            stability.by_configuration(found).to_parquet(path / "stability.parquet", index=False)
            write_json(path / "stability.json", found)
            return {"stability": found, "cost": {"tokens": sum(b["rows"] for b in blocks), **cost}}

        inputs = {"evaluation": validation.path.name, "seed": seed}
        return self._stage("stability", inputs, build)

    def domains(self, validation: Stage, tokens: Stage, records: Stage, sites: Iterable[str]) -> Stage:
        """Fidelity by domain, from the evaluation's sums: `domains.parquet`, `domains.json`."""

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import risk

            names = names_of(blocks_of(tokens, "validation"))
            problems = [p for p in read_records(records.path / "records.parquet") if p.split == "validation"]
            roots = [root for site in sites if (root := validation.path / site).is_dir()]  # where an SAE was measured
            table, facts = risk.coverage(roots, names, problems, self.bootstrap)
            table.to_parquet(path / "domains.parquet", index=False)
            write_json(path / "domains.json", facts)
            return {}

        return self._stage("domains", {"evaluation": validation.path.name, "records": records.path.name}, build)

    def transfer(
        self, saes: Stage, validation: Stage, tokens: Stage, model: str, ids: Sequence[str], site: str,
        away: Mapping[str, tuple[Stage, Stage]],
    ) -> Stage:  # fmt: skip
        """Fidelity of some SAEs of one site on other datasets, against that on the validation split: `transfer.json`."""
        measured: dict[str, tuple[Stage, Stage]] = {}
        for name, (_, other_tokens) in away.items():
            say(f"transfer to {name}: {', '.join(ids)}")
            other_store = self.store(other_tokens, model, site)
            measured[name] = (
                other_tokens,
                self.evaluation("test", saes, other_store, other_tokens, model, only=tuple(ids)),
            )

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import transfer

            home = (validation.path / site, names_of(blocks_of(tokens, "validation")), metrics_of(validation))
            found = {}
            for name, (other_tokens, stage_there) in measured.items():
                there = (
                    stage_there.path / site,
                    names_of(other_tokens.manifest["blocks"]),
                    metrics_of(stage_there),
                )
                compared = transfer.compare(ids, home, there, self.bootstrap)
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
            from raysae.evaluate import invariance

            made = invariance.write_variants(
                path / "tokens", read_records(records.path / "records.parquet"), e.invariance, tokenizer,
                context_length, self.config.capture.rows_per_shard, seed,
            )  # fmt: skip
            task = invariance.Reading(
                site, saes.path / "saes" / sae_id, path / "latents", self.config.capture.tokens_per_forward
            )
            works = {"reworded examples": task}
            cost = self._over_blocks(works, made["blocks"], invariance.done, path / "tokens", model)
            found = invariance.collect(path / "latents", path / "tokens", self.bootstrap)
            write_json(path / "invariance.json", {"sae_id": sae_id, **found})
            return {"cost": {"tokens": sum(made["rows"].values()), **cost}}

        inputs = {
            "sweep": saes.key, "tokens": tokens.path.name, "sae_id": sae_id, "examples": e.invariance,
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
            "sweep": saes.key,
            "sae": sae_id,
            "records": records.path.name,
            "store": store.path.name,
            "nulls": other.nulls.path.name if other else None,
            "probes": p.model_dump(mode="json"),
            "seed": self.config.seed,
        }
        with _in_section("probes", type(p).model_fields):
            return self._stage("probes", inputs, build)

    def features(
        self, sae_id: str, site: str, saes: Stage, store: Stage, tokens: Stage, records: Stage, model: str
    ) -> Stage:
        """What each latent of an SAE fires on, over validation rows: the files of `evaluate.features`."""
        e = self.config.evaluation

        def build(path: Path) -> Mapping[str, Any]:
            from raysae.evaluate import features

            settings = features.Settings(self.bootstrap, e.feature_rows, e.contexts)
            decode = self._tokenizer(model).backend_tokenizer.decode
            say(f"features: {sae_id}")
            start = perf_counter()
            rows = features.build(
                path, sae_id, saes.path / "saes" / sae_id, store.path, site, "validation",
                {block["name"]: tokens.path / block["file"] for block in tokens.manifest["blocks"]},
                lambda ids: decode(ids, skip_special_tokens=False), records.path / "records.parquet", settings,
            )  # fmt: skip
            return {"cost": {"tokens": rows, **of_driver(perf_counter() - start)}}

        inputs = {
            "sweep": saes.key,
            "sae": sae_id,
            "split": "validation",
            **e.model_dump(mode="json", include={"feature_rows", "contexts", "bootstrap", "confidence"}),
            "seed": self.config.seed,
        }
        return self._stage("features", inputs, build)

    def _check_labels(self, records: Stage) -> None:
        """Refuse labels that no problem has before anything is captured."""
        p = self.config.probes
        if p.labels:
            from raysae.evaluate import probes

            problems = [q for q in read_records(records.path / "records.parquet") if q.split == p.split]
            with _in_section("probes", type(p).model_fields):
                probes.check_labels(problems, p.labels, p.split, p.folds)

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


@contextmanager
def _in_section(section: str, fields: Iterable[str]) -> Iterator[None]:
    """A mistake in one of these fields is named with its section: `labels: ...` becomes `probes.labels: ...`."""
    try:
        yield
    except UserError as error:
        inside = str(error).partition(":")[0] in fields
        raise UserError(f"{section}.{error}" if inside else str(error)) from None
