"""What is measured of SAEs and nulls, whether seeds and datasets agree, and what latents say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from raysae.activations.store import Store
from raysae.data.records import read_records
from raysae.errors import UserError
from raysae.evaluate import features as latent_features
from raysae.evaluate import fidelity, risk
from raysae.evaluate import invariance as rewording
from raysae.evaluate import probes as label_probes
from raysae.evaluate import stability as recurrence
from raysae.evaluate import transfer as elsewhere
from raysae.evaluate.nulls import ELSEWHERE, LINEAR, beside
from raysae.evaluate.statistics import Bootstrap
from raysae.files import read_table, write_json
from raysae.progress import say
from raysae.stages.data import TRANSFER
from raysae.stages.work import blocks_of, names_of, of_driver, over_blocks, refuse_partial
from raysae.workspace import Inputs, Made, Stage

if TYPE_CHECKING:
    from raysae.bench import Bench
    from raysae.config.sections import EvaluationConfig, ProbesConfig
    from raysae.stages.store import Captured

NOT_MEASURED_BY = {"nulls", "invariance", "features", "feature_rows", "contexts"}
"""Fields of the evaluation that the evaluation stage does not depend on: they have stages of their own."""


class Measured(NamedTuple):
    """Nulls, the activations that they read, and their measurements on a split of these."""

    nulls: Stage
    captured: Captured
    evaluation: Stage


class Measuring(NamedTuple):
    """How SAEs are measured."""

    config: EvaluationConfig
    tokens_per_forward: int
    seed: int

    @property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.config.bootstrap, self.config.confidence, self.seed)


def evaluation(
    how: Measuring, split: str, captured: Captured, saes: Stage | None, nulls: Stage | None = None,
    only: Sequence[str] | None = None,
) -> Stage:  # fmt: skip
    """Measurements on a split of every SAE and null, of those that `only` names, or of nulls alone (rows only):
    `metrics.json`, and the sums by group and block that they are from."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        blocks, opened = blocks_of(inputs["tokens"], split), Store(inputs["store"].path)
        opened.check_model(captured.model.fingerprint(inputs))
        scored = min(1.0, how.config.max_tokens / max(sum(block["rows"] for block in blocks), 1)) if saes else 0.0
        works = {
            f"measure {len(members)} SAEs of {site} on {split}": fidelity.Measurement(
                opened.path, site, tuple(members), path / site, how.tokens_per_forward, scored
            )
            for site, members in _to_measure(inputs, only).items()
        }
        model = captured.model.loading(inputs)
        cost = over_blocks(bench, works, blocks, fidelity.done, inputs["tokens"].path, model)
        metrics: dict[str, Any] = {}
        for work in works.values():
            metrics |= fidelity.collect(work.root, names_of(blocks), opened.mean(work.site), how.bootstrap)
        wanted = [sae_id for work in works.values() for sae_id, _ in work.saes]
        refuse_partial(f"measurements on {split}", wanted, metrics)
        write_json(path / "metrics.json", metrics)
        return {"metrics": metrics, "cost": {"tokens": sum(b["rows"] for b in blocks), **cost}}

    def settings(inputs: Inputs) -> dict[str, Any]:
        return {
            "sweep": inputs["saes"].key if saes else None,
            "split": split,
            "only": only,
            "evaluation": how.config.model_dump(mode="json", exclude=NOT_MEASURED_BY),
            "seed": how.seed,
        }

    prefix = TRANSFER if captured.store.kind.startswith(TRANSFER) else ""
    inputs = {"saes": saes, "nulls": nulls, **captured.inputs}
    named = {"nulls", "store"} if prefix else {"nulls"}
    return Stage(f"{prefix}evaluation", 6, settings, inputs, build, implied=frozenset(inputs) - named)


def _to_measure(inputs: Inputs, only: Sequence[str] | None) -> dict[str, list[tuple[str, Path]]]:
    """(id, directory) of the SAEs and nulls to measure, by site: all that finished, or those that `only` names."""
    wanted: dict[str, list[tuple[str, Path]]] = {}
    if "saes" in inputs:
        saes = inputs["saes"].path
        table = read_table(saes / "table.parquet")
        for row in table[table["status"] == "completed"].itertuples():
            if only is None or row.sae_id in only:
                wanted.setdefault(str(row.site), []).append((str(row.sae_id), saes / "saes" / str(row.sae_id)))
    if "nulls" in inputs:
        nulls = inputs["nulls"]
        for name, facts in nulls.manifest["nulls"].items():
            if facts["made"] and (only is None or name in only):
                wanted.setdefault(facts["site"], []).append((name, nulls.path / "saes" / name))
    return wanted


def metrics_of(evaluated: Made) -> dict[str, dict[str, Any]]:
    """What an evaluation measured, by id; NaN again where its manifest says null."""
    metrics = evaluated.manifest["metrics"]
    return {i: {name: math.nan if value is None else value for name, value in m.items()} for i, m in metrics.items()}


def metrics_of_nulls(nulls: Made, evaluated: Made) -> dict[str, dict[str, Any]]:
    """What an evaluation measured of each null that was made and is in it, and its facts, by id."""
    measured = metrics_of(evaluated)
    metrics = {}
    for name, facts in nulls.manifest["nulls"].items():
        if facts["made"] and name in measured:
            # A linear code's directions that never fire can be left out of it: they are no width that was paid for.
            dead = 0.0 if facts["kind"] in LINEAR else measured[name]["never_fired_fraction"]
            metrics[name] = {**measured[name], **facts, "sae_id": name, "dead_fraction": dead}
    return metrics


def stability(how: Measuring, captured: Captured, saes: Stage, validation: Stage) -> Stage:
    """Whether seeds find the same latents: `stability.json`, `stability.parquet`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        tokens, measured, root = inputs["tokens"], inputs["validation"], inputs["saes"].path
        blocks = blocks_of(tokens, "validation")
        names, table = names_of(blocks), read_table(root / "table.parquet")
        seeds = recurrence.match_all(table, root / "saes", measured.path, names, how.seed)
        tasks = recurrence.tasks(seeds, inputs["store"].path, root / "saes", path)
        works = {f"what recurs at {task.site}": task for task in tasks}
        model = captured.model.loading(inputs)
        cost = over_blocks(bench, works, blocks, recurrence.done, tokens.path, model)
        recurring = recurrence.collect(path, names, table, metrics_of(measured), how.bootstrap)
        recurrence.by_configuration(recurring).to_parquet(path / "stability.parquet", index=False)
        write_json(path / "stability.json", recurring)
        return {"stability": recurring, "cost": {"tokens": sum(b["rows"] for b in blocks), **cost}}

    def settings(inputs: Inputs) -> dict[str, Any]:
        return {"evaluation": inputs["validation"].key, "seed": how.seed}

    inputs = {"saes": saes, "validation": validation, **captured.inputs}
    return Stage("stability", 3, settings, inputs, build, implied=frozenset(inputs))


def domains(how: Measuring, captured: Captured, validation: Stage, records: Stage) -> Stage:
    """Fidelity by domain, from the evaluation's sums: `domains.parquet`, `domains.json`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        names, measured = names_of(blocks_of(inputs["tokens"], "validation")), inputs["validation"].path
        problems = read_records(inputs["records"].path / "records.parquet")
        sites = inputs["store"].manifest["sites"]
        roots = [root for site in sites if (root := measured / site).is_dir()]  # where an SAE was measured
        validation = [p for p in problems if p.split == "validation"]
        table, facts = risk.coverage(roots, names, validation, how.bootstrap)
        table.to_parquet(path / "domains.parquet", index=False)
        write_json(path / "domains.json", facts)
        return {}

    def settings(inputs: Inputs) -> dict[str, Any]:
        return {"evaluation": inputs["validation"].key}

    inputs = {"validation": validation, "records": records, "store": captured.store, "tokens": captured.tokens}
    return Stage("domains", 3, settings, inputs, build, implied=frozenset(inputs) - {"records"})


class Away(NamedTuple):
    """Another dataset, all of it held out, and the measurements there."""

    records: Stage
    captured: Captured
    evaluation: Stage


def transfer(
    how: Measuring, captured: Captured, validation: Stage, away: Mapping[str, Away], ids: Sequence[str], site: str
) -> Stage:
    """Fidelity of some SAEs of one site on other datasets, against that on the validation split: `transfer.json`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        measured = inputs["validation"]
        home = (measured.path / site, names_of(blocks_of(inputs["tokens"], "validation")), metrics_of(measured))
        datasets = {}
        for name in away:
            records, tokens, there = (inputs[f"{name}/{part}"] for part in ("records", "tokens", "evaluation"))
            other = (there.path / site, names_of(tokens.manifest["blocks"]), metrics_of(there))
            compared = elsewhere.compare(ids, home, other, how.bootstrap)
            examples, left_out = records.manifest["examples"]["test"], records.manifest["left_out"]
            datasets[name] = {"examples": examples, "left_out": left_out, "saes": compared}
            datasets[name]["over_seeds"] = elsewhere.over_seeds(compared)
        write_json(path / "transfer.json", datasets)
        return {}

    def settings(inputs: Inputs) -> dict[str, Any]:
        there = {name: inputs[f"{name}/evaluation"].key for name in away}
        return {"home": inputs["validation"].key, "away": there, "saes": list(ids)}

    inputs = {"validation": validation, "tokens": captured.tokens}
    for name, (records, other, evaluated) in away.items():
        inputs |= {f"{name}/records": records, f"{name}/tokens": other.tokens, f"{name}/evaluation": evaluated}
    return Stage("transfer", 2, settings, inputs, build, implied=frozenset(inputs))


def invariance(
    how: Measuring, captured: Captured, saes: Stage, records: Stage, sae_id: str, site: str, rows_per_block: int
) -> Stage:
    """Which latents of an SAE still fire when examples are worded differently: `invariance.json`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        problems = read_records(inputs["records"].path / "records.parquet")
        length = inputs["tokens"].manifest["context_length"]
        facts = rewording.write_variants(
            path / "tokens", problems, how.config.invariance, captured.model.tokenizer, length, rows_per_block, how.seed
        )
        sae = inputs["saes"].path / "saes" / sae_id
        task = rewording.Reading(site, sae, path / "latents", how.tokens_per_forward)
        model, works = captured.model.loading(inputs), {"reworded examples": task}
        cost = over_blocks(bench, works, facts["blocks"], rewording.done, path / "tokens", model)
        firings = rewording.collect(task.root, path / "tokens", how.bootstrap)
        write_json(path / "invariance.json", {"sae_id": sae_id, **firings})
        return {"cost": {"tokens": sum(facts["rows"].values()), **cost}}

    def settings(inputs: Inputs) -> dict[str, Any]:
        e = how.config
        return {
            "sweep": inputs["saes"].key, "tokens": inputs["tokens"].key, "sae_id": sae_id, "examples": e.invariance,
            "bootstrap": e.bootstrap, "confidence": e.confidence, "seed": how.seed,
        }  # fmt: skip

    inputs = {"saes": saes, "records": records, "tokens": captured.tokens, **captured.model.inputs}
    return Stage("invariance", 2, settings, inputs, build, implied=frozenset(inputs))


def probes(
    config: ProbesConfig, seed: int, captured: Captured, saes: Stage, records: Stage, sae_id: str, site: str,
    other: Measured | None,
) -> Stage:  # fmt: skip
    """What can be read from an SAE's latents: `probes.parquet`, `probes.json`; other: SAEs of the untrained model."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        subject = label_probes.subject(inputs["store"].path, site, inputs["saes"].path / "saes" / sae_id)
        untrained = None
        if other is not None:
            nulls = inputs["nulls"]
            null = beside(nulls.manifest["nulls"], ELSEWHERE, site, subject.sae.config.architecture)
            if null:
                untrained = label_probes.subject(inputs["other_store"].path, site, nulls.path / "saes" / null)
        settings = label_probes.Settings(**config.model_dump(exclude={"labels"}), seed=seed)
        problems = read_records(inputs["records"].path / "records.parquet")
        with in_section("probes", type(config).model_fields):
            table, facts = label_probes.probe(subject, problems, config.labels, settings, untrained)
        label_probes.write(path, table, facts, settings, sae_id=sae_id, site=site)
        return {"sae_id": sae_id, "labels": list(config.labels)}

    def settings(inputs: Inputs) -> dict[str, Any]:
        return {"sweep": inputs["saes"].key, "sae": sae_id, "probes": config.model_dump(mode="json"), "seed": seed}

    inputs: dict[str, Stage | None] = {"saes": saes, "records": records, "store": captured.store, "nulls": None}
    if other:
        inputs |= {"nulls": other.nulls, "other_store": other.captured.store}
    return Stage("probes", 2, settings, inputs, build, implied=frozenset({"saes", "other_store"}))


def features(
    how: Measuring, captured: Captured, saes: Stage, records: Stage, sae_id: str, site: str
) -> Stage:
    """What each latent of an SAE fires on, over validation rows: the files of `evaluate.features`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        e, tokens = how.config, inputs["tokens"]
        settings = latent_features.Settings(how.bootstrap, e.feature_rows, e.contexts)
        decode = captured.model.tokenizer.backend_tokenizer.decode
        say(f"features: {sae_id}")
        start = perf_counter()
        rows = latent_features.build(
            path, sae_id, inputs["saes"].path / "saes" / sae_id, inputs["store"].path, site, "validation",
            {block["name"]: tokens.path / block["file"] for block in tokens.manifest["blocks"]},
            lambda ids: decode(ids, skip_special_tokens=False), inputs["records"].path / "records.parquet", settings,
        )  # fmt: skip
        return {"cost": {"tokens": rows, **of_driver(perf_counter() - start)}}

    def settings(inputs: Inputs) -> dict[str, Any]:
        fields = {"feature_rows", "contexts", "bootstrap", "confidence"}
        return {
            "sweep": inputs["saes"].key,
            "sae": sae_id,
            "split": "validation",
            **how.config.model_dump(mode="json", include=fields),
            "seed": how.seed,
        }

    inputs = {"saes": saes, "records": records, "store": captured.store, "tokens": captured.tokens}
    return Stage("features", 2, settings, inputs, build, implied=frozenset(inputs))


@contextmanager
def in_section(section: str, fields: Iterable[str]) -> Iterator[None]:
    """A mistake in one of these fields is named with its section: `labels: ...` becomes `probes.labels: ...`."""
    try:
        yield
    except UserError as error:
        inside = str(error).partition(":")[0] in fields
        raise UserError(f"{section}.{error}" if inside else str(error)) from None
