"""What is measured of SAEs and nulls, whether seeds and datasets agree, and what latents say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from raysae.activations.store import Store
from raysae.data.records import read_records
from raysae.errors import UserError
from raysae.evaluate import features as latent_features
from raysae.evaluate import fidelity, risk
from raysae.evaluate import invariance as wordings
from raysae.evaluate import probes as label_probes
from raysae.evaluate import stability as seeds
from raysae.evaluate import transfer as elsewhere
from raysae.evaluate.linear import Settings as ProbeSettings
from raysae.evaluate.nulls import ELSEWHERE, LINEAR, beside
from raysae.evaluate.rows import measure_rows
from raysae.evaluate.scan import Settings as FeatureSettings
from raysae.evaluate.statistics import Bootstrap
from raysae.files import read_table, write_json
from raysae.progress import say
from raysae.sae import formats
from raysae.stages.work import blocks_of, names_of, of_driver, over_blocks, refuse_partial
from raysae.workspace import Inputs, Made, Stage

if TYPE_CHECKING:
    from raysae.bench import Bench
    from raysae.config.sections import EvaluationConfig, ProbesConfig
    from raysae.stages.model import Model
    from raysae.stages.store import Captured


class Measuring(NamedTuple):
    """How SAEs are measured."""

    config: EvaluationConfig
    tokens_per_forward: int
    seed: int

    @property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.config.bootstrap, self.config.confidence, self.seed)


class Measured(NamedTuple):
    """SAEs, nulls or both, as they were measured on a split of some activations."""

    captured: Captured
    nulls: Stage | None
    sums: Stage
    """By block and group, in a folder per site; what the model is asked for."""
    evaluation: Stage
    """Metrics with intervals, from the sums."""


def measured(
    how: Measuring, split: str, captured: Captured, saes: Stage | None, nulls: Stage | None = None,
    only: Sequence[str] | None = None,
) -> Measured:  # fmt: skip
    """Measurements on a split of every SAE and null, of those that `only` names, or of nulls alone (rows only)."""
    sums = measurement(how, split, captured, saes, nulls, only)
    return Measured(captured, nulls, sums, evaluation(how, split, captured.store, sums))


def measurement(
    how: Measuring, split: str, captured: Captured, saes: Stage | None, nulls: Stage | None, only: Sequence[str] | None
) -> Stage:
    """Sums by group over the blocks of a split, of SAEs and nulls: what `fidelity.Measurement` writes, by site."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        opened, members = Store(inputs["store"].path), _to_measure(inputs, only)
        ids = {site: [sae_id for sae_id, _ in saes] for site, saes in members.items()}
        if captured.model is None:
            start, names = perf_counter(), opened.names(split)
            for site, saes in members.items():
                measure_rows(opened, site, {i: formats.load(folder) for i, folder in saes}, split, path / site)
            cost = of_driver(perf_counter() - start)
        else:
            opened.check_model(captured.model.fingerprint(inputs))
            blocks = blocks_of(inputs["tokens"], split)
            works = {
                f"measure {len(saes)} SAEs of {site} on {split}": fidelity.Measurement(
                    opened.path, site, tuple(saes), path / site, how.tokens_per_forward,
                    max_scored / max(sum(block["rows"] for block in blocks), max_scored, 1),
                )
                for site, saes in members.items()
            }  # fmt: skip
            model, names = captured.model.loading(inputs), names_of(blocks)
            cost = over_blocks(bench, works, blocks, fidelity.done, inputs["tokens"].path, model)
        return {"saes": ids, "blocks": names, "cost": {"tokens": opened.rows(split), **cost}}

    max_scored = how.config.max_tokens if saes and captured.model else 0
    settings = {"split": split, "only": only, "max_tokens": max_scored}
    inputs = {"saes": saes, "nulls": nulls, **captured.inputs}
    implied = frozenset(inputs) - {"saes", "nulls", "store"}
    return Stage("measurement", 1, settings, inputs, build, implied=implied)


def evaluation(how: Measuring, split: str, store: Stage, sums: Stage) -> Stage:
    """Metrics of SAEs and nulls with intervals, from the sums of a split: `metrics.json`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        opened, summed = Store(inputs["store"].path), inputs["sums"]
        metrics: dict[str, Any] = {}
        for site in summed.manifest["saes"]:
            root, blocks = summed.path / site, summed.manifest["blocks"]
            metrics |= fidelity.collect(root, blocks, opened.mean(site), how.bootstrap)
        wanted = [sae_id for ids in summed.manifest["saes"].values() for sae_id in ids]
        refuse_partial(f"measurements on {split}", wanted, metrics)
        write_json(path / "metrics.json", metrics)
        return {"metrics": metrics}

    inputs = {"sums": sums, "store": store}
    return Stage("evaluation", 7, {"bootstrap": asdict(how.bootstrap)}, inputs, build, implied=frozenset({"store"}))


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


def recurrence(how: Measuring, captured: Captured, saes: Stage, sums: Stage) -> Stage:
    """Latents matched across seeds, and the sums of what recurs: what `evaluate.stability.tasks` writes, by site."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        tokens, root = inputs["tokens"], inputs["saes"].path
        blocks = blocks_of(tokens, "validation")
        model = hosted(captured).loading(inputs)
        table = read_table(root / "table.parquet")
        matches = seeds.match_all(table, root / "saes", inputs["sums"].path, names_of(blocks), how.seed)
        tasks = seeds.tasks(matches, inputs["store"].path, root / "saes", path)
        works = {f"what recurs at {task.site}": task for task in tasks}
        cost = over_blocks(bench, works, blocks, seeds.done, tokens.path, model)
        return {"blocks": names_of(blocks), "cost": {"tokens": sum(b["rows"] for b in blocks), **cost}}

    inputs = {"saes": saes, "sums": sums, **captured.inputs}
    return Stage("recurrence", 1, {"seed": how.seed}, inputs, build, implied=frozenset(inputs) - {"sums"})


def stability(how: Measuring, saes: Stage, recurring: Stage, evaluated: Stage) -> Stage:
    """Whether seeds find the same latents: `stability.json`, `stability.parquet`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        table = read_table(inputs["saes"].path / "table.parquet")
        sums, metrics = inputs["recurrence"], metrics_of(inputs["evaluation"])
        facts = seeds.collect(sums.path, sums.manifest["blocks"], table, metrics, how.bootstrap)
        seeds.by_configuration(facts).to_parquet(path / "stability.parquet", index=False)
        write_json(path / "stability.json", facts)
        return {"stability": facts}

    inputs = {"saes": saes, "recurrence": recurring, "evaluation": evaluated}
    return Stage("stability", 4, {"bootstrap": asdict(how.bootstrap)}, inputs, build, implied=frozenset({"saes"}))


def domains(how: Measuring, sums: Stage, records: Stage) -> Stage:
    """Fidelity by domain, from the sums on the validation split: `domains.parquet`, `domains.json`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        summed = inputs["sums"]
        problems = read_records(inputs["records"].path / "records.parquet")
        roots = [summed.path / site for site in summed.manifest["saes"]]
        validation = [p for p in problems if p.split == "validation"]
        table, facts = risk.coverage(roots, summed.manifest["blocks"], validation, how.bootstrap)
        table.to_parquet(path / "domains.parquet", index=False)
        write_json(path / "domains.json", facts)
        return {}

    return Stage("domains", 4, {"bootstrap": asdict(how.bootstrap)}, {"sums": sums, "records": records}, build)


def transfer(
    how: Measuring, home: Measured, away: Mapping[str, tuple[Stage, Measured]], ids: Sequence[str], site: str
) -> Stage:
    """Fidelity of some SAEs of one site on other datasets (records and measurements by name), against that on the
    validation split: `transfer.json`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        def measurements(name: str) -> tuple[Path, list[str], dict[str, dict[str, Any]]]:
            sums = inputs[f"{name}/sums"]
            return sums.path / site, sums.manifest["blocks"], metrics_of(inputs[f"{name}/evaluation"])

        datasets = {}
        for name in away:
            compared = elsewhere.compare(ids, measurements("home"), measurements(name), how.bootstrap)
            taken = inputs[f"{name}/records"].manifest
            datasets[name] = {"examples": taken["examples"]["test"], "left_out": taken["left_out"], "saes": compared}
            datasets[name]["over_seeds"] = elsewhere.over_seeds(compared)
        write_json(path / "transfer.json", datasets)
        return {}

    inputs: dict[str, Stage] = {}
    for name, at in {"home": home, **{name: m for name, (_, m) in away.items()}}.items():
        inputs |= {f"{name}/sums": at.sums, f"{name}/evaluation": at.evaluation}
    inputs |= {f"{name}/records": records for name, (records, _) in away.items()}
    settings = {"saes": list(ids), "site": site, "bootstrap": asdict(how.bootstrap)}
    implied = frozenset(name for name in inputs if not name.endswith("/evaluation"))
    return Stage("transfer", 3, settings, inputs, build, implied=implied)


def rewording(
    how: Measuring, captured: Captured, saes: Stage, records: Stage, sae_id: str, site: str, rows_per_block: int
) -> Stage:
    """Validation examples worded differently, and what the latents of an SAE are on them: `tokens/`, `latents/`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        model, problems = hosted(captured), read_records(inputs["records"].path / "records.parquet")
        length = inputs["tokens"].manifest["context_length"]
        facts = wordings.write_variants(
            path / "tokens", problems, how.config.invariance, model.tokenizer, length, rows_per_block, how.seed
        )
        sae = inputs["saes"].path / "saes" / sae_id
        task = wordings.Reading(site, sae, path / "latents", how.tokens_per_forward)
        works = {"reworded examples": task}
        cost = over_blocks(bench, works, facts["blocks"], wordings.done, path / "tokens", model.loading(inputs))
        return {"cost": {"tokens": sum(facts["rows"].values()), **cost}}

    settings = {"sae": sae_id, "examples": how.config.invariance, "seed": how.seed}
    inputs = {"saes": saes, "records": records, **captured.inputs}
    implied = frozenset(inputs) - {"saes", "tokens"}
    return Stage("rewording", 1, settings, inputs, build, implied=implied)


def invariance(how: Measuring, reworded: Stage, sae_id: str) -> Stage:
    """Which latents of an SAE still fire when examples are worded differently: `invariance.json`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        root = inputs["rewording"].path
        firings = wordings.collect(root / "latents", root / "tokens", how.bootstrap)
        write_json(path / "invariance.json", {"sae_id": sae_id, **firings})
        return {}

    return Stage("invariance", 3, {"bootstrap": asdict(how.bootstrap)}, {"rewording": reworded}, build)


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
        settings = ProbeSettings(**config.model_dump(exclude={"labels"}), seed=seed)
        problems = read_records(inputs["records"].path / "records.parquet")
        with in_section("probes", type(config).model_fields):
            table, facts = label_probes.probe(subject, problems, config.labels, settings, untrained)
        label_probes.write(path, table, facts, settings, sae_id=sae_id, site=site)
        return {"sae_id": sae_id, "labels": list(config.labels)}

    inputs: dict[str, Stage | None] = {"saes": saes, "records": records, "store": captured.store}
    if other:
        inputs |= {"nulls": other.nulls, "other_store": other.captured.store}
    settings = {"sae": sae_id, "probes": config.model_dump(mode="json"), "seed": seed}
    implied = frozenset({"records", "store", "other_store"})
    return Stage("probes", 3, settings, inputs, build, implied=implied)


def features(how: Measuring, captured: Captured, saes: Stage, records: Stage, sae_id: str, site: str) -> Stage:
    """What each latent of an SAE fires on, over validation rows: the files of `evaluate.features`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        e, tokens = how.config, inputs["tokens"]
        settings = FeatureSettings(how.bootstrap, e.feature_rows, e.contexts)
        decode = hosted(captured).tokenizer.backend_tokenizer.decode
        say(f"features: {sae_id}")
        start = perf_counter()
        corpus = latent_features.Corpus(
            Store(inputs["store"].path),
            site,
            {block["name"]: tokens.path / block["file"] for block in tokens.manifest["blocks"]},
            lambda ids: decode(ids, skip_special_tokens=False),
            read_records(inputs["records"].path / "records.parquet"),
        )
        sae = formats.load(inputs["saes"].path / "saes" / sae_id)
        latents = latent_features.measure(sae, corpus, "validation", settings)
        latent_features.write(path, latents, sae_id=sae_id)
        return {"cost": {"tokens": latents.summary["rows"], **of_driver(perf_counter() - start)}}

    e = how.config
    settings = {"sae": sae_id, "rows": e.feature_rows, "contexts": e.contexts, "bootstrap": asdict(how.bootstrap)}
    inputs = {"saes": saes, "records": records, **captured.inputs}
    return Stage("features", 3, settings, inputs, build, implied=frozenset(inputs) - {"saes"})


def hosted(captured: Captured) -> Model:
    """The model that activations are of; ValueError where they are vectors from elsewhere."""
    if captured.model is None:
        raise ValueError("these activations are of no model that could be asked")
    return captured.model


@contextmanager
def in_section(section: str, fields: Iterable[str]) -> Iterator[None]:
    """A mistake in one of these fields is named with its section: `labels: ...` becomes `probes.labels: ...`."""
    try:
        yield
    except UserError as error:
        inside = str(error).partition(":")[0] in fields
        raise UserError(f"{section}.{error}" if inside else str(error)) from None
