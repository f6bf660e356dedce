"""The main job: records → tokens → activations → SAEs → measurements → decision → report.

`run_sweep(job)` makes every stage that has not been made and returns the `Run`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from raysae import run_folder
from raysae.artifacts import MANIFEST, fingerprint, link_or_copy
from raysae.config.jobs import SweepJob
from raysae.config.load import dump_yaml
from raysae.config.sections import DataConfig
from raysae.data.records import read_records
from raysae.environment import environment
from raysae.errors import Damaged, UserError
from raysae.evaluate.fidelity import Paired
from raysae.evaluate.nulls import ELSEWHERE
from raysae.evaluate.probes import check_labels
from raysae.evaluate.stability import columns as stability_columns
from raysae.files import (
    folder_name,
    is_temporary,
    output_root,
    read_json,
    read_table,
    remove_dead,
    write_atomic,
    write_json,
)  # fmt: skip
from raysae.gates.criteria import Gate, check_can_choose, load_gate, passes, rivals
from raysae.gates.decision import decide
from raysae.gates.metrics import split_of
from raysae.gates.select import choose
from raysae.gates.waivers import load_waiver, read_basis
from raysae.looks import look
from raysae.plan.budget import ITEMS, refuse_overspending, spending
from raysae.plan.schedule import activation_bytes, sae_bytes
from raysae.progress import say
from raysae.run import Run
from raysae.seal import IDENTITY, identity_of
from raysae.stages import data, evidence, store
from raysae.stages import model as models
from raysae.stages.evidence import Away, Measured, Measuring, in_section, metrics_of
from raysae.stages.saes import Sweep, nulls, saes
from raysae.stages.work import blocks_of, names_of
from raysae.sweep.collect import alike
from raysae.sweep.replay import Replay
from raysae.workspace import Made, Stage, Workspace

if TYPE_CHECKING:
    from raysae.bench import Bench

RESERVED = ("stages", "looks", "replications")
"""Folders of an output root that are no run's."""
MADE_FROM = "made_from"
OF_THE_STORE = ("model", "sites", "rows", "dtype", "left_out", "not_compared")
"""What a run's store.json holds of its store's manifest."""


def run_sweep(job: SweepJob, bench: Bench | None = None) -> Run:
    """Run the main job and return its `Run`; what has been made before is not made again.

    bench: where work runs; unset, the Ray cluster of `job.cluster`, which is left again. Raises UserError for a mistake in
    the config or the input, before anything is written where that can be known.
    """
    with bench_of(job, bench) as bench:
        return SweepStudy(job, bench).run()


@contextmanager
def bench_of(job: SweepJob, bench: Bench | None = None) -> Iterator[Bench]:
    """The bench, or Ray for the block; it starts when a stage first has work for it."""
    if bench is not None:
        yield bench
        return
    from raysae.on_ray.bench import RayBench

    bench = RayBench(job.cluster, job.tracking.wandb_project)
    try:
        yield bench
    finally:
        bench.close()


class SweepStudy:
    """A job as stages, and the run that is made from them. Nothing has run of a new one."""

    def __init__(self, job: SweepJob, bench: Bench, replay: Replay | None = None) -> None:
        self.job = job
        self.root = output_root(job.output, given="output" in job.model_fields_set)
        self.workspace = Workspace(self.root, bench, job.verify)
        self.sweep = Sweep(job.sweep, job.training, job.seed, replay)
        self.gate: Gate = load_gate(job.gate)
        self.waiver = load_waiver(job.waiver, self.gate, job.basis) if job.waiver else None
        self.basis = read_basis(job.basis, self.waiver) if job.basis else None
        check_can_choose(self.gate, job.evaluation.nulls, job.gate)
        self.measuring = Measuring(job.evaluation, job.capture.tokens_per_forward, job.seed)
        self.model = models.model(job.model, job.seed)
        self.sites = store.sites_of(self.model, job.capture.sites)
        self.records = data.records(job.data, job.seed)
        self.tokens = self._tokens(self.records, job.data)
        self.away = dict(self._held_out())
        self.captured = self._captured(self.tokens, self.model, self.sites)
        self.saes = saes(self.sweep, self.captured, job.data)
        kinds = [kind for kind in job.evaluation.nulls if kind != ELSEWHERE]
        own = nulls(kinds, self.sweep, self.saes, self.captured, job.data)
        self.validation = evidence.evaluation(self.measuring, "validation", self.captured, self.saes, own)
        self.controls = [Measured(own, self.captured, self.validation)]
        """Nulls, and their measurements on the validation split: of the model's own activations first."""
        if ELSEWHERE in job.evaluation.nulls:
            untrained = self._captured(self.tokens, models.with_random_weights(self.model, job.seed), self.sites)
            trained = nulls([ELSEWHERE], self.sweep, self.saes, untrained, job.data)
            measured = evidence.evaluation(self.measuring, "validation", untrained, None, trained)
            self.controls.append(Measured(trained, untrained, measured))
        self._check_run()

    def run(self) -> Run:
        """All stages, then the run's directory."""
        self.prepare()
        for _, _, evaluated in self.controls:
            self.workspace.make(evaluated)
        table, controls, stages = self.gather()
        decision = self.judge(table, controls)
        return self.write(table, decision, [*stages, *self.about_lead(table, decision)])

    def prepare(self) -> None:
        """Make what costs seconds, records and tokens, and check all that can be checked with them: labels, vocabulary,
        budget."""
        self._check_budget()
        say(f"run {self.directory}")
        records, probes = self.workspace.make(self.records), self.job.probes
        if probes.labels:  # before anything is captured
            problems = [p for p in read_records(records.path / "records.parquet") if p.split == probes.split]
            with in_section("probes", type(probes).model_fields):
                check_labels(problems, probes.labels, probes.split, probes.folds)
        store.check_vocabulary(self.workspace.make(self.tokens), self.model)
        self._check_budget(self.workspace.make(self.tokens))
        for name, (_, tokens) in self.away.items():
            say(f"transfer to {name}")
            with _of_transfer(name):
                store.check_vocabulary(self.workspace.make(tokens), self.model)

    def gather(self) -> tuple[pd.DataFrame, dict[str, dict[str, Any]], list[tuple[str, Stage]]]:
        """The table, the controls, and the stages that say more, each with its folder of the run."""
        swept, metrics = self.workspace.make(self.saes), metrics_of(self.workspace.make(self.validation))
        table = read_table(swept.path / "table.parquet")
        measured = pd.DataFrame({i: m for i, m in metrics.items() if i in set(table["sae_id"])}).T
        if len(measured):
            table = table.merge(measured.rename_axis("sae_id").reset_index(), on="sae_id", how="left")
        table = _with_last_rung(table, read_table(swept.path / "curves.parquet"))
        controls = self._metrics_of_nulls(self.controls)
        if not len(measured):  # no SAE completed its training
            return table, controls, []
        stages = [("", evidence.domains(self.measuring, self.captured, self.validation, self.records))]
        if len(self.job.sweep.seeds) > 1:
            stages.append(("", evidence.stability(self.measuring, self.captured, self.saes, self.validation)))
            recurring = self.workspace.make(stages[-1][1]).manifest["stability"]
            table = table.merge(stability_columns(recurring), on="sae_id", how="left")
            for c in controls.values():  # an untrained SAE's decoder is random directions: it is as stable as the null
                if c["kind"] == "untrained":
                    c |= recurring["nulls"].get(f"{c['architecture']}-{c['d_sae']}-{c['site']}", {})
        return table, controls, stages

    def judge(self, table: pd.DataFrame, controls: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The content of decision.json: the choices, measured once more on test. Adds `pareto` and `passes_gate` to the
        table."""
        subtract = self._paired("validation", self.controls)
        choice = choose(table, self.gate, controls, self.waiver, subtract, list(self.sites))
        table["pareto"] = table["sae_id"].isin(choice.front)
        table["passes_gate"] = table["sae_id"].map(lambda i: i in choice.verdicts and passes(choice.verdicts[i]))
        rows = {str(row["sae_id"]): row for row in table.to_dict("records")}
        tests, looks, on_test = dict[str, dict[str, Any]](), None, None
        if choice.chosen:
            looks = self._look("choice", choice.chosen)
            held = {name for i in choice.chosen for name in rivals(self.gate, rows[i], controls)}
            again = self._on_test(choice.chosen, held)
            tested = metrics_of(self.workspace.make(again[0].evaluation))
            for i in choice.chosen:
                carried = {
                    n: v for n, v in rows[i].items()
                    if n in ("sae_id", "site") or n.startswith("stability_") or split_of(n, "test") != "test"
                }  # fmt: skip
                tests[i] = {**carried, **tested[i]}
            null_metrics = self._metrics_of_nulls(again, held)
            for name, c in null_metrics.items():
                c |= {n: v for n, v in controls[name].items() if n.startswith("stability_")}
            on_test = null_metrics, self._paired("test", again)
        validation = {i: rows[i] for i in choice.chosen}
        return decide(
            self.gate, str(self.job.gate), choice, controls, tests, self.waiver, self.basis, validation, looks,
            subtract, on_test,
        )  # fmt: skip

    def about_lead(self, table: pd.DataFrame, decision: Mapping[str, Any]) -> list[tuple[str, Stage]]:
        """What is measured of the chosen SAE, or the closest, alone: stages, each with its folder of the run."""
        stages: list[tuple[str, Stage]] = []
        how, job, lead = self.measuring, self.job, decision["chosen"] or decision["closest"]
        completed = table[table["status"] == "completed"].set_index("sae_id", drop=False)
        if lead is not None:
            site = str(completed.at[lead, "site"])
            if self.away:
                ids = [lead, *(str(i) for i in alike(completed, completed.loc[lead])["sae_id"] if i != lead)]
                stages.append(("", self._transfer(ids, site)))
            if job.evaluation.invariance:
                rows = job.capture.rows_per_shard
                reworded = evidence.invariance(how, self.captured, self.saes, self.records, lead, site, rows)
                stages.append(("", reworded))
            if job.probes.labels:
                if job.probes.split == "test":
                    self._look("probes", [lead])
                other = self.controls[1] if len(self.controls) > 1 else None
                about = (self.captured, self.saes, self.records, lead, site)
                stages.append(("probes", evidence.probes(job.probes, job.seed, *about, other)))
        leads = [c["chosen"] or c["closest"] for c in decision["choices"].values()]
        which = {"all": list(completed.index), "chosen": [i for i in leads if i is not None], "none": []}
        for i in which[job.evaluation.features]:
            of_latents = evidence.features(how, self.captured, self.saes, self.records, i, completed.at[i, "site"])
            stages.append((f"saes/{i}/features", of_latents))
        return stages

    def write(self, table: pd.DataFrame, decision: Mapping[str, Any], stages: Sequence[tuple[str, Stage]]) -> Run:
        """The run's directory, unless it is there: replaced as one whole."""
        shown = [(below, self.workspace.make(stage)) for below, stage in stages]
        swept, kept = self.workspace.make(self.saes), self.workspace.make(self.captured.store).manifest
        metrics = metrics_of(self.workspace.make(self.validation))
        directory, ledger, names = self.directory, self._ledger(), list(self.workspace.made)
        reused = all(made.reused for made in self.workspace.made.values())
        whole = reused and run_folder.stands(directory, names, self.job.verify)
        if whole and _limits(Run(directory).ledger) == _limits(ledger):
            return Run(directory)
        self.workspace.check()

        def fill(folder: Path) -> None:
            write_json(folder / IDENTITY, self.identity())
            write_atomic(folder / "config.yaml", lambda path: path.write_text(dump_yaml(self.job)))
            write_atomic(folder / "table.parquet", lambda path: table.to_parquet(path, index=False))
            write_atomic(folder / "table.csv", lambda path: table.to_csv(path, index=False))
            link_or_copy(swept.path / "curves.parquet", folder / "curves.parquet")
            for below, part in shown:
                for file in sorted({*part.path.glob("*.json*"), *part.path.glob("*.parquet")} - {part.path / MANIFEST}):
                    link_or_copy(file, folder / below / file.name)
            for sae_id in table.loc[table["status"] == "completed", "sae_id"]:
                link_or_copy(swept.path / "saes" / folder_name(sae_id, "sae_id"), folder / "saes" / sae_id)
                write_json(folder / "saes" / sae_id / "metrics.json", metrics[sae_id])
            facts = {}
            for trained, captured, _ in self.controls:
                null_stage, read = self.workspace.make(trained), self.workspace.make(captured.store)
                if (null_stage.path / "saes").is_dir():
                    link_or_copy(null_stage.path / "saes", folder / "nulls")
                for name, null in null_stage.manifest["nulls"].items():
                    facts[name] = {**null, "store": read.path.name}
            (folder / "tune").symlink_to(Path("..") / "stages" / swept.path.name / "tune")
            write_json(folder / "store.json", {k: kept[k] for k in OF_THE_STORE})
            write_json(folder / "nulls.json", facts)
            write_json(folder / "environment.json", environment())
            write_json(folder / "ledger.json", ledger)
            write_json(folder / "decision.json", decision)

        run_folder.write(directory, self.root, names, fingerprint(self.identity()), fill)
        return Run(directory)

    # ------------------------------------------------------------------------------------------------------------------
    # Stages

    def _tokens(self, records: Stage, config: DataConfig) -> Stage:
        return data.tokens(records, self.model, config, self.job.capture.rows_per_shard, self.job.seed)

    def _captured(self, tokens: Stage, model: models.Model, sites: Sequence[str]) -> store.Captured:
        return store.captured(tokens, model, sites, self.job.capture, self.job.seed)

    def _held_out(self) -> Iterator[tuple[str, tuple[Stage, Stage]]]:
        """Records and tokens of each dataset to transfer to."""
        for name, config in self.job.transfer.items():
            with _of_transfer(name):
                records = data.records(config, self.job.seed, self.records)
                yield name, (records, self._tokens(records, config))

    def _transfer(self, ids: Sequence[str], site: str) -> Stage:
        away = {}
        for name, (records, tokens) in self.away.items():
            say(f"transfer to {name}: {', '.join(ids)}")
            captured = self._captured(tokens, self.model, [site])
            measured = evidence.evaluation(self.measuring, "test", captured, self.saes, only=ids)
            away[name] = Away(records, captured, measured)
        return evidence.transfer(self.measuring, self.captured, self.validation, away, ids, site)

    def _on_test(self, chosen: Sequence[str], held: Collection[str]) -> list[Measured]:
        """The chosen SAEs, and the nulls that they are held against, on the test split."""
        again = []
        for i, (trained, captured, _) in enumerate(self.controls):
            names = self.workspace.make(trained).manifest["nulls"]
            only = [*(chosen if i == 0 else ()), *sorted(name for name in names if name in held)]
            if only:
                swept = self.saes if i == 0 else None
                measured = evidence.evaluation(self.measuring, "test", captured, swept, trained, only)
                self.workspace.make(measured)
                again.append(Measured(trained, captured, measured))
        return again

    def _metrics_of_nulls(
        self, controls: Sequence[Measured], only: Collection[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """What was measured of each null that was made, or of some, and its facts."""
        metrics: dict[str, dict[str, Any]] = {}
        for trained, _, evaluated in controls:
            metrics |= evidence.metrics_of_nulls(self.workspace.make(trained), self.workspace.make(evaluated))
        return metrics if only is None else {name: m for name, m in metrics.items() if name in only}

    def _paired(self, split: str, measured: Sequence[Measured]) -> Callable[..., Any]:
        """Differences between any two SAEs and nulls, as they were measured on a split."""
        evaluated = [self.workspace.make(m.evaluation) for m in measured]
        blocks = blocks_of(self.workspace.make(self.tokens), split)
        roots = [root for made in evaluated for site in self.sites if (root := made.path / site).is_dir()]
        metrics = {i: m for made in evaluated for i, m in metrics_of(made).items()}
        return Paired.read(roots, names_of(blocks), metrics, self.measuring.bootstrap).difference

    # ------------------------------------------------------------------------------------------------------------------
    # The run's folder, and what it is allowed to be

    def _look(self, by: str, ids: Sequence[str]) -> dict[str, Any]:
        """Count a look at the test rows."""
        what = {"run": self.identity(), "saes": list(ids)}
        return look(self.root, self.workspace.make(self.records).path.name, by, self.directory.name, what)

    def _ledger(self) -> dict[str, Any]:
        """What each stage cost, when it was made: wall seconds, CPU- and GPU-seconds held, tokens, bytes on disk."""
        keys = ("seconds", "cpu_seconds", "gpu_seconds", "tokens", "bytes")
        stages: list[dict[str, Any]] = [
            {"stage": made.kind, "directory": name, "reused": made.reused}
            | {key: made.manifest["cost"].get(key, 0) for key in keys}
            for name, made in self.workspace.made.items()
        ]
        total = {key: sum(s[key] for s in stages) for key in keys}
        return {"stages": stages, "total": total, "budget": spending(stages, self.job.budget.model_dump())}

    @property
    def widths(self) -> dict[str, int]:
        """d_in of each site."""
        return {site: self.model.facts.width(site) for site in self.sites}

    def _check_budget(self, tokens: Made | None = None) -> None:
        """Refuse a run that is certain to ask for more than its budget: by its SAEs alone, then with its tokens too.

        What is left out is what has to be measured (device-hours, the training of the embedded model) and what is small
        (row columns, tables): `--plan` projects those. Pruning may save some, which nobody can promise.
        """
        job, widths = self.job, self.widths
        points, seeds = self.sweep.points(widths)[0], len(job.sweep.seeds)
        trained = len(points) * seeds * self.sweep.tokens
        size = sum(sae_bytes(widths[p.site], round(p.expansion_factor * widths[p.site])) for p in points) * seeds
        what = f"{len(points) * seeds} SAEs"
        if tokens is not None:
            rows = tokens.manifest["rows"]
            trained += 2 * sum(rows.values()) + rows["validation"]  # tokenized, captured, measured
            size += activation_bytes(sum(rows.values()), list(widths.values()), job.capture.dtype)
            what += f" and the activations of {sum(rows.values()):,} tokens"
        refuse_overspending({"tokens": trained, "gigabytes": size / 1e9}, job.budget.model_dump(), what)

    @cached_property
    def directory(self) -> Path:
        """`<output>/<run>`."""
        job = self.job
        if job.run is not None:
            if folder_name(job.run, "run") in RESERVED:
                raise UserError(f"run: {job.run!r} is kept for what runs share; give another --run")
            return self.root / job.run
        name = re.sub(r"[^\w.+-]", "-", Path(job.model.name).name).lstrip(".") or "model"
        return self.root / f"{name[:100]}-{job.data.source}-{fingerprint(self.identity(), 8)}"

    def identity(self) -> dict[str, Any]:
        """What the run's results depend on: its config but for where it runs, what gate, waiver and basis say, and the
        hashes of the data, the model and the tokenizer that the config names."""
        waiver = self.waiver.model_dump(mode="json") if self.waiver else None
        content = {"gate": self.gate.model_dump(mode="json"), "waiver": waiver, "basis": self.basis}
        return {**self.job.identity(), **content, MADE_FROM: self.made_from}

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """Hashes of what the config names: the same paths with other content are another run. By the fields' names."""
        hashes: dict[str, Any] = {"data.path": _source_hash(self.records)}
        if self.model.stage is None:
            hashes["model.name"] = self.model.identity({})
        if self.model.stage is None or self.job.model.tokenizer:
            hashes["model.tokenizer"] = fingerprint(self.model.tokenizer.backend_tokenizer.to_str())
        for name, (records, _) in self.away.items():
            hashes[f"transfer.{name}.path"] = _source_hash(records)
        return hashes

    def _check_run(self) -> None:
        """Refuse a run directory that belongs to another config, or was made from something else."""
        remove_dead(self.directory)
        if not self.directory.is_dir() or all(is_temporary(path.name) for path in self.directory.iterdir()):
            return
        owner = identity_of(self.directory)
        if owner is None:
            raise UserError(f"run: {self.directory} is not empty and no run of raysae; give another --run")
        if owner == fingerprint(self.identity()):
            return
        try:
            then = read_json(self.directory / IDENTITY).get(MADE_FROM, {})
        except Damaged:
            then = {}
        for what, made_from in self.made_from.items():
            if what in then and then[what] != made_from:
                raise UserError(
                    f"run: {self.directory} was made from other content of {what}; bring that back, or give another --run"
                )
        raise UserError(
            f"run: {self.directory} belongs to another config or gate; give another --run, or leave it unset"
        )


@contextmanager
def _of_transfer(name: str) -> Iterator[None]:
    """A mistake in the `data` of a dataset to transfer to is named by that dataset's field."""
    try:
        yield
    except UserError as error:
        words, where = str(error), f"transfer.{name}"
        said = words.replace("data", where, 1) if words.startswith("data.") else f"{where}: {words}"
        raise UserError(said) from None


def _with_last_rung(table: pd.DataFrame, rungs: pd.DataFrame) -> pd.DataFrame:
    """FVU and L0 of SAEs that were stopped early, from their last rung (a validation sample, no interval)."""
    last = rungs.groupby("sae_id").tail(1).set_index("sae_id")
    for column in ("fvu", "l0"):
        measured = table[column].astype(float) if column in table else pd.Series(math.nan, table.index)
        table[column] = measured.fillna(table["sae_id"].map(last[column]))
    return table


def _source_hash(records: Stage) -> str | None:
    assert isinstance(records.settings, Mapping)
    return records.settings["source_hash"]


def _limits(ledger: Mapping[str, Any]) -> list[float | None]:
    """The budget that a ledger was held against."""
    budget = ledger.get("budget") or {}
    return [budget.get(item, {}).get("limit") for item in ITEMS]
