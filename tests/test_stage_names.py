"""A stage's folder is named by what goes in: an older run's stages are found again as long as their names stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small import study

from raysae.config.jobs import SweepJob
from raysae.config.load import load_config
from raysae.models.embedded import embedded_facts
from raysae.models.host import model_facts
from raysae.stages import evidence
from raysae.stages import model as models
from raysae.studies import sweep
from raysae.sweep.collect import FACTS
from raysae.workspace import Made, Workspace

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SAE, SITE = "000-relu-x4", "blocks.2.resid_post"
MANIFEST: dict[str, Any] = {
    "largest_id": 0, "blocks": [], "context_length": 96, "rows": {"train": 8, "validation": 1}, "left_out": {},
    "not_compared": None, "nulls": {}, "separator_id": 0,
}  # fmt: skip


def names_of(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of a job's stages in the order of the study, without making any; weights are called as their folder."""

    def facts_of(name: str, *given: Any) -> Any:
        return model_facts(name, *given) if Path(name).is_dir() else embedded_facts()

    def build(self: Workspace, stage: Any, inputs: Any, directory: str) -> Made:
        return Made(self.root / "stages" / directory, {"stage": stage.kind, **MANIFEST}, reused=True)

    monkeypatch.setattr(models, "fingerprint_of", lambda name, *given: {"name": name, "weights": Path(name).name})
    monkeypatch.setattr(models, "model_facts", facts_of)
    monkeypatch.setattr(Workspace, "_build", build)
    monkeypatch.setattr(sweep, "read_records", lambda path: [])
    monkeypatch.setattr(sweep, "check_labels", lambda *given: None)
    job = load_config(SweepJob, ["--config", str(config), "--output", str(tmp_path)])
    mine = study(job)
    make, how = mine.workspace.make, mine.measuring
    mine.prepare()
    for measured in mine.controls:
        make(measured.evaluation)
    make(evidence.domains(how, mine.captured, mine.validation, mine.records))
    if len(job.sweep.seeds) > 1:
        make(evidence.stability(how, mine.captured, mine.saes, mine.validation))
    make(evidence.evaluation(how, "test", mine.captured, mine.saes, mine.controls[0].nulls, [SAE]))
    row = {name: 0 for name in FACTS} | {"sae_id": SAE, "status": "completed", "site": SITE}
    decision = {"chosen": SAE, "choices": {SITE: {"chosen": SAE}}}
    for _, stage in mine.about_lead(pd.DataFrame([row]), decision):
        make(stage)
    return list(mine.workspace.made)


QUICKSTART = (
    "records-5a3f0a37f41f",
    "tokens-c919c177763e",
    "model-93a602f9db6a",
    "store-a3e57d0c6417",
    "sweep-1199f3aaeaa0",
    "nulls-8e11f7b69e86",
    "evaluation-895d6f6773e7",
    "domains-d4227911c0c7",
    "evaluation-b8da61b9b8c4",
    "features-c408c5e4a11f",
)
GSM_NANO_REPORT = (
    "records-ae5b567128fa",
    "tokens-ef02b268150c",
    "transfer_records-264238268c2b",
    "transfer_tokens-ac1d82dd4bcc",
    "store-91bf1da7f810",
    "sweep-6bd5e39fd451",
    "nulls-3d09cf201030",
    "evaluation-ce38cda3dfde",
    "null_model-70bc3caac46d",
    "store-5546bde48518",
    "nulls-6ecefb88172d",
    "evaluation-3018c2a31d36",
    "domains-fb828f9bff47",
    "stability-c2a5268cb207",
    "evaluation-63ebcb7ec72a",
    "transfer_store-ad577cd265da",
    "transfer_evaluation-f76e9689a805",
    "transfer-722b87fc7bb0",
    "invariance-648f6e634237",
    "probes-a3cbc3085267",
    "features-32c93c61c737",
)


@pytest.fixture
def beside_data(tmp_path, monkeypatch):
    """A working directory like the repository's, for paths that configs name from there."""
    (tmp_path / "raysae").mkdir()
    (tmp_path / "raysae" / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path / "raysae")
    return tmp_path


def test_the_stages_of_the_quickstart_keep_their_names(beside_data, monkeypatch):
    assert names_of(CONFIGS / "quickstart.yaml", beside_data, monkeypatch) == list(QUICKSTART)


def test_the_stages_of_the_report_on_gsm_nano_keep_their_names(beside_data, monkeypatch, shared):
    (beside_data / "shared").symlink_to(shared)
    assert names_of(CONFIGS / "gsm_nano_report.yaml", beside_data, monkeypatch) == list(GSM_NANO_REPORT)
