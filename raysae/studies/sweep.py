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

from raysae.artifacts import MANIFEST, fingerprint, link_or_copy
from raysae.config.jobs import SweepJob
from raysae.config.sections import DataConfig
from raysae.data.records import read_records
from raysae.errors import UserError
from raysae.evaluate.fidelity import Paired
from raysae.evaluate.nulls import ELSEWHERE
from raysae.evaluate.probes import check_labels
from raysae.evaluate.stability import columns as stability_columns
from raysae.files import folder_name, read_table, write_atomic, write_json
from raysae.gates.criteria import check_can_choose, passes, rivals
from raysae.gates.decision import decide
from raysae.gates.metrics import split_of
from raysae.gates.select import choose
from raysae.plan.budget import refuse_overspending
from raysae.plan.schedule import activation_bytes, sae_bytes
from raysae.progress import say
from raysae.run import Run
from raysae.stages import data, evidence, store
from raysae.stages import model as models
from raysae.stages.evidence import Measured, Measuring, in_section, metrics_of
from raysae.stages.saes import Sweep, nulls, saes
from raysae.studies.study import Study, bench_of
from raysae.sweep.collect import alike
from raysae.sweep.replay import Replay
from raysae.workspace import Made, Stage

if TYPE_CHECKING:
    from raysae.bench import Bench

OF_THE_STORE = ("model", "sites", "rows", "dtype", "left_out", "not_compared")
"""What a run's store.json holds of its store's manifest."""


def run_sweep(job: SweepJob, bench: Bench | None = None) -> Run:
    """Run the main job and return its `Run`; what has been made before is not made again.

    bench: where work runs; unset, the Ray cluster of `job.cluster`, which is left again. Raises UserError for a mistake in
    the config or the input, before anything is written where that can be known.
    """
    with bench_of(job, bench) as bench:
        return SweepStudy(job, bench).run()


class SweepStudy(Study):
    """The main job as stages, and the run that is made from them. Nothing has run of a new one."""

    job: SweepJob

    def __init__(self, job: SweepJob, bench: Bench, replay: Replay | None = None) -> None:
        super().__init__(job, bench)
        self.sweep = Sweep(job.sweep, job.training, job.seed, replay)
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
        self.validation = evidence.measured(self.measuring, "validation", self.captured, self.saes, own)
        self.controls = [self.validation]
        """With nulls, on the validation split: of the model's own activations first."""
        if ELSEWHERE in job.evaluation.nulls:
            untrained = self._captured(self.tokens, models.with_random_weights(self.model, job.seed), self.sites)
            trained = nulls([ELSEWHERE], self.sweep, self.saes, untrained, job.data)
            self.controls.append(evidence.measured(self.measuring, "validation", untrained, None, trained))
        self.check_run()

    def run(self) -> Run:
        """All stages, then the run's directory."""
        self.prepare()
        for control in self.controls:
            self.workspace.make(control.evaluation)
        table, controls, stages = self.gather()
        decision = self.judge(table, controls)
        return self.finish(table, decision, [*stages, *self.about_lead(table, decision)])

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
        swept, metrics = self.workspace.make(self.saes), metrics_of(self.workspace.make(self.validation.evaluation))
        table = read_table(swept.path / "table.parquet")
        measured = pd.DataFrame({i: m for i, m in metrics.items() if i in set(table["sae_id"])}).T
        if len(measured):
            table = table.merge(measured.rename_axis("sae_id").reset_index(), on="sae_id", how="left")
        table = _with_last_rung(table, read_table(swept.path / "curves.parquet"))
        controls = self._metrics_of_nulls(self.controls)
        if not len(measured):  # no SAE completed its training
            return table, controls, []
        how, (captured, _, sums, evaluated) = self.measuring, self.validation
        stages = [("", evidence.domains(how, sums, self.records))]
        if len(self.job.sweep.seeds) > 1:
            recurrence = evidence.recurrence(how, captured, self.saes, sums)
            stages.append(("", evidence.stability(how, self.saes, recurrence, evaluated)))
            recurring = self.workspace.make(stages[-1][1]).manifest["stability"]
            table = table.merge(stability_columns(recurring), on="sae_id", how="left")
            for c in controls.values():  # an untrained SAE's decoder is random directions: it is as stable as the null
                if c["kind"] == "untrained":
                    c |= recurring["nulls"].get(f"{c['architecture']}-{c['d_sae']}-{c['site']}", {})
        return table, controls, stages

    def judge(self, table: pd.DataFrame, controls: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The content of decision.json: the choices, measured once more on test. Adds `pareto` and `passes_gate` to the
        table."""
        subtract = self._paired(self.controls)
        choice = choose(table, self.gate, controls, self.waiver, subtract, list(self.sites))
        table["pareto"] = table["sae_id"].isin(choice.front)
        table["passes_gate"] = table["sae_id"].map(lambda i: i in choice.verdicts and passes(choice.verdicts[i]))
        rows = {str(row["sae_id"]): row for row in table.to_dict("records")}
        tests, looks, on_test = dict[str, dict[str, Any]](), None, None
        if choice.chosen:
            looks = self.look(self.records, "choice", choice.chosen)
            held = {name for i in choice.chosen for name in rivals(self.gate, rows[i], controls)}
            again = self._on_test(choice.chosen, held)
            tested = metrics_of(self.workspace.make(again[0].evaluation))
            for i in choice.chosen:
                carried = {n: v for n, v in rows[i].items() if n in ("sae_id", "site") or split_of(n, "test") != "test"}
                tests[i] = {**carried, **tested[i]}
            null_metrics = self._metrics_of_nulls(again, held)
            for name, c in null_metrics.items():
                c |= {n: v for n, v in controls[name].items() if split_of(n, "test") == "validation"}
            on_test = null_metrics, self._paired(again)
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
                reworded = evidence.rewording(how, self.captured, self.saes, self.records, lead, site, rows)
                stages.append(("", evidence.invariance(how, reworded, lead)))
            if job.probes.labels:
                if job.probes.split == "test":
                    self.look(self.records, "probes", [lead])
                other = self.controls[1] if len(self.controls) > 1 else None
                about = (self.captured, self.saes, self.records, lead, site)
                stages.append(("probes", evidence.probes(job.probes, job.seed, *about, other)))
        leads = [c["chosen"] or c["closest"] for c in decision["choices"].values()]
        which = {"all": list(completed.index), "chosen": [i for i in leads if i is not None], "none": []}
        for i in which[job.evaluation.features]:
            of_latents = evidence.features(how, self.captured, self.saes, self.records, i, completed.at[i, "site"])
            stages.append((f"saes/{i}/features", of_latents))
        return stages

    def finish(self, table: pd.DataFrame, decision: Mapping[str, Any], stages: Sequence[tuple[str, Stage]]) -> Run:
        """The run's directory, unless it is there: replaced as one whole."""
        shown = [(below, self.workspace.make(stage)) for below, stage in stages]
        swept, kept = self.workspace.make(self.saes), self.workspace.make(self.captured.store).manifest
        metrics = metrics_of(self.workspace.make(self.validation.evaluation))

        def fill(folder: Path) -> None:
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
            for control in self.controls:
                made, read = self._nulls(control), self.workspace.make(control.captured.store)
                if (made.path / "saes").is_dir():
                    link_or_copy(made.path / "saes", folder / "nulls")
                for name, null in made.manifest["nulls"].items():
                    facts[name] = {**null, "store": read.path.name}
            if (swept.path / "tune").is_dir():
                (folder / "tune").symlink_to(Path("..") / "stages" / swept.path.name / "tune")
            write_json(folder / "store.json", {k: kept[k] for k in OF_THE_STORE})
            write_json(folder / "nulls.json", facts)
            write_json(folder / "decision.json", decision)

        return self.write(fill)

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
            away[name] = records, evidence.measured(self.measuring, "test", captured, self.saes, only=ids)
        return evidence.transfer(self.measuring, self.validation, away, ids, site)

    def _on_test(self, chosen: Sequence[str], held: Collection[str]) -> list[Measured]:
        """The chosen SAEs, and the nulls that they are held against, on the test split."""
        again = []
        for i, control in enumerate(self.controls):
            names = self._nulls(control).manifest["nulls"]
            only = [*(chosen if i == 0 else ()), *sorted(name for name in names if name in held)]
            if only:
                saes = self.saes if i == 0 else None
                again.append(evidence.measured(self.measuring, "test", control.captured, saes, control.nulls, only))
        return again

    def _nulls(self, control: Measured) -> Made:
        assert control.nulls is not None
        return self.workspace.make(control.nulls)

    def _metrics_of_nulls(
        self, controls: Sequence[Measured], only: Collection[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """What was measured of each null that was made, or of some, and its facts."""
        metrics: dict[str, dict[str, Any]] = {}
        for control in controls:
            metrics |= evidence.metrics_of_nulls(self._nulls(control), self.workspace.make(control.evaluation))
        return metrics if only is None else {name: m for name, m in metrics.items() if name in only}

    def _paired(self, measured: Sequence[Measured]) -> Callable[..., Any]:
        """Differences between any two SAEs and nulls, as they were measured on one split."""
        metrics: dict[str, dict[str, Any]] = {}
        roots, blocks = list[Path](), list[str]()
        for m in measured:
            sums = self.workspace.make(m.sums)
            blocks = sums.manifest["blocks"]
            roots += [sums.path / site for site in sums.manifest["saes"]]
            metrics |= metrics_of(self.workspace.make(m.evaluation))
        return Paired.read(roots, blocks, metrics, self.measuring.bootstrap).difference

    # ------------------------------------------------------------------------------------------------------------------
    # What the run is, and what it may cost

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

    @property
    def name(self) -> str:
        model = re.sub(r"[^\w.+-]", "-", Path(self.job.model.name).name).lstrip(".") or "model"
        return f"{model[:100]}-{self.job.data.source}"

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
