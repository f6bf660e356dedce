"""A finished run, opened from its directory: the table, the SAEs, the decision, the figures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from raysae.activations.store import Store
from raysae.artifacts import read_json, read_json_if
from raysae.errors import UserError
from raysae.evaluate.nulls import ELSEWHERE, beside
from raysae.evaluate.probes import Subject, subject
from raysae.sae import formats
from raysae.sae.sae import SAE


@dataclass(frozen=True)
class Run:
    """`Run.open("results/<run>")` reads what the job wrote; nothing is computed again."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in `path`; UserError if there is no finished run."""
        run = cls(Path(path))
        if not (run.path / "decision.json").is_file():
            raise UserError(f"run: {path} has no decision.json; it is not a finished run of raysae")
        return run

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return yaml.safe_load((self.path / "config.yaml").read_text())

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per SAE; intervals as `<metric>_low`, `<metric>_high`."""
        return pd.read_parquet(self.path / "table.parquet")

    @cached_property
    def curves(self) -> pd.DataFrame:
        """One row per SAE and rung: tokens, fvu and l0 on a validation sample, loss, dead_fraction."""
        return pd.read_parquet(self.path / "curves.parquet")

    @cached_property
    def decision(self) -> dict[str, Any]:
        """Verdict, criteria with values and intervals, the chosen SAE, and why each other was rejected."""
        return read_json(self.path / "decision.json")

    @cached_property
    def ledger(self) -> dict[str, Any]:
        """What each stage cost."""
        return read_json(self.path / "ledger.json")

    @property
    def go(self) -> bool:
        return self.decision["verdict"] == "go"

    @property
    def saes(self) -> list[str]:
        """Ids of the SAEs that can be loaded."""
        return sorted(path.parent.name for path in (self.path / "saes").glob("*/cfg.json"))

    def sae(self, sae_id: str | None = None) -> SAE:
        """An SAE by id; the chosen one if none is named."""
        wanted = sae_id or self.decision["chosen"]
        if wanted is None:
            raise UserError(
                f"run: {self.path} chose no SAE ({self.decision['reason']}); name one of {', '.join(self.saes)}"
            )
        if wanted not in self.saes:
            raise UserError(f"run: {self.path} has no SAE {wanted!r}; it has {', '.join(self.saes)}")
        return formats.load(self.path / "saes" / wanted)

    @property
    def best(self) -> str | None:
        """Id of the chosen SAE; of the closest to the gate where none was chosen."""
        return self.decision["chosen"] or self.decision["closest"]

    def site(self, sae_id: str) -> str:
        """The site whose activations an SAE reads."""
        return str(self.table.set_index("sae_id").at[sae_id, "site"])

    def stage(self, name: str) -> Path:
        """Directory of the run's first stage of this name (records, tokens, store, ...), which is of its own model;
        UserError where it is gone."""
        return self.stage_directory(next(s["directory"] for s in self.ledger["stages"] if s["stage"] == name))

    def stage_directory(self, directory: str) -> Path:
        """A stage's directory, by its own name; UserError where it is gone."""
        path = self.path.resolve().parent / "stages" / directory
        if not path.is_dir():
            raise UserError(f"run: {self.path} needs its stage {path}, which is not there; run the sweep again")
        return path

    @cached_property
    def nulls(self) -> dict[str, dict[str, Any]]:
        """Kind, site, architecture, compared SAE and store of each null by id; the SAEs lie in `nulls/<id>/`."""
        return read_json_if(self.path / "nulls.json")

    def subject(self, sae_id: str | None = None) -> Subject:
        """An SAE, the best if none is named, with the store and site that it reads."""
        sae = self.sae(sae_id or self.best)  # first: it knows the names
        return Subject(Store(self.stage("store")), self.site(str(sae_id or self.best)), sae)

    def untrained_model(self, sae_id: str) -> Subject | None:
        """The null beside an SAE that was trained on the model with random weights; None if it was not measured."""
        row = self.table.set_index("sae_id").loc[sae_id]
        name = beside(self.nulls, ELSEWHERE, str(row["site"]), str(row.get("architecture")))
        if name is None:
            return None
        store = self.stage_directory(self.nulls[name]["store"])
        return subject(store, str(row["site"]), self.path / "nulls" / name)

    @property
    def figures(self) -> dict[str, Path]:
        """SVG files by figure name."""
        return {path.stem: path for path in sorted((self.path / "figures").glob("*.svg"))}

    @property
    def report(self) -> Path:
        return self.path / "report.html"
