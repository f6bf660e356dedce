"""The one flow: records → tokens → activations → SAEs → measurements → decision → report.

`sweep(config)` runs every stage that has not been done and returns the `Run`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from raysae import run_folder
from raysae.artifacts import MANIFEST, NotMade, Stage, fingerprint, link_or_copy
from raysae.budget import ITEMS, refuse_overspending, spending
from raysae.config import SweepJob, dump_yaml
from raysae.environment import environment
from raysae.errors import Damaged, UserError
from raysae.evaluate.nulls import ELSEWHERE, LINEAR
from raysae.evaluate.stability import columns as stability_columns
from raysae.evidence import Controls, Evidence
from raysae.files import folder_name, is_temporary, read_json, read_table, remove_dead, write_atomic, write_json
from raysae.gates.criteria import Gate, check_can_choose, load_gate, passes, rivals
from raysae.gates.decision import decide
from raysae.gates.metrics import split_of
from raysae.gates.select import choose
from raysae.gates.waivers import load_waiver, read_basis
from raysae.looks import look
from raysae.progress import say
from raysae.run import Run
from raysae.schedule import activation_bytes, sae_bytes
from raysae.seal import IDENTITY, identity_of
from raysae.stages import blocks_of, metrics_of, names_of
from raysae.sweep.collect import alike
from raysae.sweep.replay import Replay

RESERVED = ("stages", "looks", "replications")
"""Folders of an output root that are no run's."""
MADE_FROM = "made_from"
OF_THE_STORE = ("model", "sites", "rows", "dtype", "left_out", "not_compared")
"""What a run's store.json holds of its store's manifest."""


def sweep(config: SweepJob) -> Run:
    """Run the main job of `config` and return its `Run`; what has been done before is not done again.

    Raises UserError for a mistake in the config or the input, before anything is written where that can be known.
    """
    flow = Flow(config)
    try:
        return flow.run()
    finally:
        flow.close()


class Prepared(NamedTuple):
    """What a run has before its model is asked for anything."""

    records: Stage
    tokens: Stage
    away: dict[str, tuple[Stage, Stage]]
    """Records and tokens of each dataset to transfer to."""


class Made(NamedTuple):
    """What a run has when all is trained and measured on the validation split."""

    saes: Stage
    validation: Stage
    controlled: Sequence[Controls]
    records: Stage
    store: Stage
    tokens: Stage
    model: str
    away: Mapping[str, tuple[Stage, Stage]]
    """Records and tokens of each dataset to transfer to."""


class Flow(Evidence):
    """A job from its config to its run's directory."""

    def __init__(self, config: SweepJob, replay: Replay | None = None) -> None:
        super().__init__(config, replay)
        self.gate: Gate = load_gate(config.gate)
        self.waiver = load_waiver(config.waiver, self.gate, config.basis) if config.waiver else None
        self.basis = read_basis(config.basis, self.waiver) if config.basis else None
        check_can_choose(self.gate, config.evaluation.nulls, config.gate)
        self._check_run()

    def run(self) -> Run:
        """All stages, then the run's directory."""
        records, tokens, away = self.prepare()
        model = self.model()
        store = self.store(tokens, model)
        sae_stage = self.saes(store, tokens)
        nulls = self._own_nulls(sae_stage, store, tokens)
        validation = self.evaluation("validation", sae_stage, store, tokens, model, nulls)
        controls = [Controls(nulls, store, validation, model)]
        if ELSEWHERE in self.config.evaluation.nulls:
            controls.append(self._untrained_model(sae_stage, tokens, model))
        return self._finish(Made(sae_stage, validation, controls, records, store, tokens, model, away))

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

    def _finish(self, made: Made) -> Run:
        """Choose, measure the choices once on test, and write the run's directory."""
        table, controls, evidence = self._gather(made)
        decision = self._judge(made, table, controls)
        return self._write(made, table, decision, [*evidence, *self._about_lead(made, table, decision)])

    def _gather(self, made: Made) -> tuple[pd.DataFrame, dict[str, dict[str, Any]], list[tuple[str, Stage]]]:
        """The table, the controls, and the stages that say more, each with its folder of the run."""
        metrics = metrics_of(made.validation)
        table = read_table(made.saes.path / "table.parquet")
        measured = pd.DataFrame({i: m for i, m in metrics.items() if not i.startswith("control-")}).T
        if len(measured):
            table = table.merge(measured.rename_axis("sae_id").reset_index(), on="sae_id", how="left")
        table = _with_last_rung(table, read_table(made.saes.path / "curves.parquet"))
        controls = controls_of(made.controlled)
        if not len(measured):  # no SAE completed its training
            return table, controls, []
        evidence = [("", self.domains(made.validation, made.tokens, made.records, made.store.manifest["sites"]))]
        if len(self.config.sweep.seeds) > 1:
            stable = self.stability(made.saes, made.validation, made.store, made.tokens, made.model)
            evidence.append(("", stable))
            recurring = stable.manifest["stability"]
            table = table.merge(stability_columns(recurring), on="sae_id", how="left")
            for c in controls.values():  # an untrained SAE's decoder is random directions: it is as stable as the null
                if c["kind"] == "untrained":
                    c |= recurring["nulls"].get(f"{c['architecture']}-{c['d_sae']}-{c['site']}", {})
        return table, controls, evidence

    def _judge(self, made: Made, table: pd.DataFrame, controls: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The content of decision.json. Adds `pareto` and `passes_gate` to the table."""
        sites = list(made.store.manifest["sites"])
        subtract = self._paired(made, "validation", made.controlled).difference
        choice = choose(table, self.gate, controls, self.waiver, subtract, sites)
        table["pareto"] = table["sae_id"].isin(choice.front)
        table["passes_gate"] = table["sae_id"].map(lambda i: i in choice.verdicts and passes(choice.verdicts[i]))
        rows = {str(row["sae_id"]): row for row in table.to_dict("records")}
        tests, looks, on_test = dict[str, dict[str, Any]](), None, None
        if choice.chosen:
            what = {"run": self.identity(), "saes": choice.chosen}
            looks = look(self.root, made.records.path.name, "choice", self.directory.name, what)
            held = {name for i in choice.chosen for name in rivals(self.gate, rows[i], controls)}
            again = self._measured_again(made, choice.chosen, held)
            tested = again[0].measured
            for i in choice.chosen:
                carried = {
                    n: v for n, v in rows[i].items()
                    if n in ("sae_id", "site") or n.startswith("stability_") or split_of(n, "test") != "test"
                }  # fmt: skip
                tests[i] = {**carried, **metrics_of(tested)[i]}
            seen = controls_of(again, held)
            for name, c in seen.items():
                c |= {n: v for n, v in controls[name].items() if n.startswith("stability_")}
            on_test = seen, self._paired(made, "test", again).difference
        validation = {i: rows[i] for i in choice.chosen}
        return decide(
            self.gate, str(self.config.gate), choice, controls, tests, self.waiver, self.basis, validation, looks,
            subtract, on_test,
        )  # fmt: skip

    def _measured_again(self, made: Made, chosen: Sequence[str], held: Collection[str]) -> list[Controls]:
        """The chosen SAEs, and the nulls that they are held against, on the test split."""
        found = []
        for nulls, store, _, model in made.controlled:
            own = nulls is made.controlled[0].nulls
            only = [*(chosen if own else ()), *sorted(name for name in nulls.manifest["nulls"] if name in held)]
            if only:
                saes = made.saes if own else None
                tested = self.evaluation("test", saes, store, made.tokens, model, nulls, only)
                found.append(Controls(nulls, store, tested, model))
        return found

    def _paired(self, made: Made, split: str, measured: Sequence[Controls]) -> Any:
        """SAEs and nulls as they were measured on a split, any two of which can be subtracted."""
        from raysae.evaluate.fidelity import Paired

        names = names_of(blocks_of(made.tokens, split))
        seen = [c.measured for c in measured]
        roots = [root for stage in seen for site in made.store.manifest["sites"] if (root := stage.path / site).is_dir()]
        metrics = {i: m for stage in seen for i, m in metrics_of(stage).items()}
        return Paired.read(roots, names, metrics, self.bootstrap)

    def _about_lead(self, made: Made, table: pd.DataFrame, decision: Mapping[str, Any]) -> list[tuple[str, Stage]]:
        """What is measured of the chosen SAE, or the closest, alone: stages, each with its folder of the run."""
        evidence: list[tuple[str, Stage]] = []
        saes, tokens, records, store, model = made.saes, made.tokens, made.records, made.store, made.model
        lead = decision["chosen"] or decision["closest"]
        leads = [c["chosen"] or c["closest"] for c in decision["choices"].values()]
        if lead is not None:
            of_lead = table.set_index("sae_id", drop=False).loc[lead]
            site = str(of_lead["site"])
            if made.away:
                ids = alike(table[table["status"] == "completed"], of_lead)["sae_id"]
                ids = [lead, *(str(i) for i in ids if i != lead)]
                evidence.append(("", self.transfer(saes, made.validation, tokens, model, ids, site, made.away)))
            if self.config.evaluation.invariance:
                evidence.append(("", self.invariance(saes, records, tokens, model, lead, site)))
            if self.config.probes.labels:
                if self.config.probes.split == "test":
                    what = {"run": self.identity(), "saes": [lead]}
                    look(self.root, records.path.name, "probes", self.directory.name, what)
                other = made.controlled[1] if len(made.controlled) > 1 else None
                evidence.append(("probes", self.probes(lead, site, saes, records, store, other)))
        completed = table[table["status"] == "completed"].set_index("sae_id")["site"]
        which = self.config.evaluation.features
        for i in completed.index if which == "all" else filter(None, leads) if which == "chosen" else []:
            of_latents = self.features(i, completed[i], saes, store, tokens, records, model)
            evidence.append((f"saes/{i}/features", of_latents))
        return evidence

    def _write(
        self, made: Made, table: pd.DataFrame, decision: Mapping[str, Any], evidence: Sequence[tuple[str, Stage]]
    ) -> Run:
        """The run's directory, unless it is there: replaced as one whole."""
        saes, store, metrics = made.saes, made.store, metrics_of(made.validation)
        directory, ledger = self.directory, self._ledger()
        stages = [s.path.name for s in self.finished]
        there = all(s.reused for s in self.finished) and run_folder.stands(directory, stages, self.config.verify)
        if there and _limits(Run(directory).ledger) == _limits(ledger):
            return Run(directory)
        self.verify()

        def fill(folder: Path) -> None:
            write_json(folder / IDENTITY, self.identity())
            write_atomic(folder / "config.yaml", lambda path: path.write_text(dump_yaml(self.config)))
            write_atomic(folder / "table.parquet", lambda path: table.to_parquet(path, index=False))
            write_atomic(folder / "table.csv", lambda path: table.to_csv(path, index=False))
            link_or_copy(saes.path / "curves.parquet", folder / "curves.parquet")
            for below, part in evidence:
                for file in sorted({*part.path.glob("*.json*"), *part.path.glob("*.parquet")} - {part.path / MANIFEST}):
                    link_or_copy(file, folder / below / file.name)
            for sae_id in table.loc[table["status"] == "completed", "sae_id"]:
                link_or_copy(saes.path / "saes" / folder_name(sae_id, "sae_id"), folder / "saes" / sae_id)
                write_json(folder / "saes" / sae_id / "metrics.json", metrics[sae_id])
            for nulls, _, _, _ in made.controlled:
                if (nulls.path / "saes").is_dir():
                    link_or_copy(nulls.path / "saes", folder / "nulls")
            (folder / "tune").symlink_to(Path("..") / "stages" / saes.path.name / "tune")
            write_json(folder / "store.json", {k: store.manifest[k] for k in OF_THE_STORE})
            facts = {
                name: {**found, "store": read.path.name}
                for nulls, read, _, _ in made.controlled
                for name, found in nulls.manifest["nulls"].items()
            }
            write_json(folder / "nulls.json", facts)
            write_json(folder / "environment.json", environment())
            write_json(folder / "ledger.json", ledger)
            write_json(folder / "decision.json", decision)

        run_folder.write(directory, self.root, stages, fingerprint(self.identity()), fill)
        return Run(directory)

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
        if c.run is not None:
            if folder_name(c.run, "run") in RESERVED:
                raise UserError(f"run: {c.run!r} is kept for what runs share; give another --run")
            return self.root / c.run
        model = re.sub(r"[^\w.+-]", "-", Path(c.model.name).name).lstrip(".") or "model"
        return self.root / f"{model[:100]}-{c.data.source}-{fingerprint(self.identity(), 8)}"

    def identity(self) -> dict[str, Any]:
        """What the run's results depend on: its config but for where it runs, what gate, waiver and basis say, and the
        hashes of the data, the model and the tokenizer that the config names."""
        waiver = self.waiver.model_dump(mode="json") if self.waiver else None
        content = {"gate": self.gate.model_dump(mode="json"), "waiver": waiver, "basis": self.basis}
        return {**self.config.identity(), **content, MADE_FROM: self.made_from}

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


def controls_of(controlled: Sequence[Controls], only: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """What was measured of each null that was made, or of some, and its facts."""
    found = {}
    for nulls, _, seen, _ in controlled:
        for name, facts in nulls.manifest["nulls"].items():
            if facts["made"] and (only is None or name in only):
                measured = metrics_of(seen)[name]
                # A linear code's directions that never fire can be left out of it: they are no width that was paid for.
                dead = 0.0 if facts["kind"] in LINEAR else measured["never_fired_fraction"]
                found[name] = {**measured, **facts, "sae_id": name, "dead_fraction": dead}
    return found


def _with_last_rung(table: pd.DataFrame, rungs: pd.DataFrame) -> pd.DataFrame:
    """FVU and L0 of SAEs that were stopped early, from their last rung (a validation sample, no interval)."""
    last = rungs.groupby("sae_id").tail(1).set_index("sae_id")
    for column in ("fvu", "l0"):
        measured = table[column].astype(float) if column in table else pd.Series(math.nan, table.index)
        table[column] = measured.fillna(table["sae_id"].map(last[column]))
    return table


def _limits(ledger: Mapping[str, Any]) -> list[float | None]:
    """The budget that a ledger was held against."""
    budget = ledger.get("budget") or {}
    return [budget.get(item, {}).get("limit") for item in ITEMS]
