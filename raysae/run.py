"""A finished run, opened from its directory: the table, the SAEs, the decision, the figures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.activations.store import Store
from raysae.artifacts import read_manifest
from raysae.config.load import read_yaml
from raysae.errors import Damaged, UserError
from raysae.evaluate.nulls import ELSEWHERE, beside
from raysae.evaluate.probes import Subject
from raysae.files import compare, folder_name, read_json, read_json_if, read_sealed, read_table
from raysae.sae import formats
from raysae.sae.sae import SAE
from raysae.seal import SEAL, check


@dataclass(frozen=True)
class Run:
    """`Run.open("results/<run>")` reads what the job wrote; nothing is computed again."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Run:
        """The run in `path`; UserError if there is no finished run, or it is not what was written.

        Compared with its seal are the sizes of all its files, and the hashes of those at the top; with `verify` of all.
        """
        run = cls(Path(path))
        if not any((run.path / name).is_file() for name in ("decision.json", SEAL)):
            raise UserError(f"run: {path} has no decision.json; it is not a finished run of raysae")
        check(run.path, verify)
        return run

    @cached_property
    def sealed(self) -> dict[str, Any]:
        """What the seal says: stages, and the size and sha256 of each file by name."""
        return read_sealed(self.path / SEAL)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return read_yaml("run", self.path / "config.yaml")

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per SAE; intervals as `<metric>_low`, `<metric>_high`."""
        return read_table(self.path / "table.parquet")

    @cached_property
    def curves(self) -> pd.DataFrame:
        """One row per SAE and rung: tokens, fvu and l0 on a validation sample, loss, dead_fraction."""
        return read_table(self.path / "curves.parquet")

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
        return self._load(f"saes/{folder_name(wanted, 'sae')}")

    def _load(self, name: str) -> SAE:
        """The SAE in a folder of the run, if its files are what was written."""
        files = {file: facts for file, facts in self.sealed["files"].items() if file.startswith(f"{name}/")}
        compare(self.path, files)
        return formats.load(self.path / name)

    @property
    def best(self) -> str | None:
        """Id of the chosen SAE; of the closest to the gate where none was chosen."""
        return self.decision["chosen"] or self.decision["closest"]

    def site(self, sae_id: str) -> str:
        """The site whose activations an SAE reads."""
        return str(self.table.set_index("sae_id").at[sae_id, "site"])

    def stage(self, name: str, verify: bool = False) -> Path:
        """Directory of the run's first stage of this name (records, tokens, store, ...), which is of its own model;
        UserError where it is gone or damaged (by the hashes of its files, with `verify`)."""
        listed = self.stages
        if name not in listed:
            raise Damaged(self.path / "ledger.json", f"lists no stage {name}")
        return self.stage_directory(listed[name], verify)

    @property
    def stages(self) -> dict[str, str]:
        """Name of the directory of the first stage of each kind, as the ledger lists them."""
        try:
            return {str(s["stage"]): s["directory"] for s in reversed(self.ledger["stages"])}
        except (KeyError, TypeError):
            raise Damaged(self.path / "ledger.json", "does not list the run's stages") from None

    def stage_directory(self, directory: str, verify: bool = False) -> Path:
        """A stage's directory, by its own name; UserError where it is gone or damaged."""
        path = self.path.resolve().parent / "stages" / folder_name(directory, f"{self.path / 'ledger.json'}: directory")
        if not path.is_dir():
            raise UserError(f"run: {self.path} needs its stage {path}, which is not there; run the sweep again")
        compare(path, read_manifest(path).get("files", {}), hashed=lambda name: verify)
        return path

    @cached_property
    def nulls(self) -> dict[str, dict[str, Any]]:
        """Kind, site, the SAEs that it stands beside, and store of each null by id; the nulls lie in `nulls/<id>/`."""
        return read_json_if(self.path / "nulls.json")

    def subject(self, sae_id: str | None = None) -> Subject:
        """An SAE, the best if none is named, with the store and site that it reads."""
        sae = self.sae(sae_id or self.best)  # first: it knows the names
        return Subject(Store(self.stage("store", verify=True)), self.site(str(sae_id or self.best)), sae)

    def untrained_model(self, sae_id: str) -> Subject | None:
        """The null beside an SAE that was trained on the model with random weights; None if it was not measured."""
        row = self.table.set_index("sae_id").loc[sae_id]
        name = beside(self.nulls, ELSEWHERE, str(row["site"]), str(row.get("architecture")))
        if name is None:
            return None
        store = self.stage_directory(self.nulls[name]["store"], verify=True)
        null = folder_name(name, str(self.path / "nulls.json"))
        return Subject(Store(store), str(row["site"]), self._load(f"nulls/{null}"))

    @property
    def figures(self) -> dict[str, Path]:
        """SVG files by figure name."""
        return {path.stem: path for path in sorted((self.path / "figures").glob("*.svg"))}

    @property
    def report(self) -> Path:
        return self.path / "report.html"
