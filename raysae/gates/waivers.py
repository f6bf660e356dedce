"""Going on regardless: a written waiver, and the earlier run that a run builds on.

A waiver is a YAML file in which a person answers for a criterion of this run's gate that need not hold, or for an earlier
run whose no-go need not stop this one. What is waived is still measured, and shown wherever the decision is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, model_validator

from raysae.config.load import read_yaml, validate
from raysae.config.sections import Section
from raysae.errors import UserError
from raysae.files import read_json
from raysae.gates.criteria import Gate, keeps_dense_out
from raysae.seal import SEAL, check

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Waiver(Section):
    """What need not hold, who says so, and why."""

    waived_by: Words
    """Who answers for it."""
    why: Words
    """The reason."""
    criteria: tuple[Words, ...] = ()
    """Criteria and unmeasured subjects of this run's gate, by their words."""
    run: Words | None = None
    """Name of the basis, an earlier run's folder, whose no-go, incomplete or missing decision is waived."""

    @model_validator(mode="after")
    def _waives_something(self) -> Waiver:
        if not self.criteria and self.run is None:
            raise ValueError("criteria or run must say what is waived")
        return self


def load_waiver(path: Path, gate: Gate, basis: Path | None) -> Waiver:
    """The waiver in a YAML file; UserError unless it fits the run's gate and basis, in one line.

    The only bound on L0 of a gate that chooses an SAE cannot be waived.
    """
    waiver = validate(Waiver, read_yaml("waiver", path), where=str(path))
    known = [*(c.criterion for c in gate.criteria), *(u.subject for u in gate.unmeasured)]
    for words in waiver.criteria:
        if words not in known:
            (closest,) = difflib.get_close_matches(words, known, n=1, cutoff=0.0)
            raise UserError(
                f"waiver: gate {gate.name} has no criterion {words!r}; did you mean {closest!r}? (in {path})"
            )
    if not keeps_dense_out(gate, waiver.criteria):
        raise UserError(
            f"waiver: {'; '.join(waiver.criteria)}: a mandatory upper bound on l0 or l0_fraction must stay, or a dense SAE "
            f"could pass (in {path})"
        )
    if waiver.run is not None and (basis is None or waiver.run != basis.resolve().name):
        named = "no basis is given" if basis is None else f"the basis is {basis.resolve().name}"
        raise UserError(f"waiver: run {waiver.run} is waived, but {named} (in {path})")
    return waiver


def read_basis(path: Path, waiver: Waiver | None) -> dict[str, Any]:
    """Path and verdict (None: it has none) of an earlier run; UserError unless it is a go, or waived."""
    if not path.is_dir():
        raise UserError(f"basis: {path} is not a folder; give that of an earlier run, such as results/<run>")
    file, name = path / "decision.json", path.resolve().name
    if file.is_file() or (path / SEAL).is_file():
        check(path)
    decision = read_json(file) if file.is_file() else {}
    verdict = decision.get("verdict")
    if verdict != "go" and (waiver is None or waiver.run != name):
        said = f"is {'a no-go' if verdict == 'no-go' else verdict}: {decision.get('reason', '')}"
        what = said if verdict else "has no decision.json: it is no finished run."
        raise UserError(f"basis: {path} {what} To go on regardless, give a waiver with run: {name}")
    return {"path": str(path), "verdict": verdict}


def in_words(decision: Mapping[str, Any]) -> str | None:
    """The waiver of a decision in one line; None where there is none."""
    if not decision.get("waiver"):
        return None
    waiver = Waiver.model_validate(decision["waiver"])
    what = [*waiver.criteria, *([f"the decision of {waiver.run}"] if waiver.run else [])]
    return f"waived: {'; '.join(what)}, by {waiver.waived_by}, because {waiver.why}"
