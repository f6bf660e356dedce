"""A stage's folder is named by what goes in: an older run's stages are found again as long as their names stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small import study

from raysae.config.jobs import SweepJob
from raysae.config.load import load_config
from raysae.config.sections import TrainingConfig
from raysae.errors import UserError
from raysae.files import write_json
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


def names_of(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *fields: str) -> list[str]:
    """Folders of a job's stages in the order of the study, without making any; weights are called as their folder."""
    return names_of_job(
        load_config(SweepJob, ["--config", str(config), "--output", str(tmp_path), *fields]), monkeypatch
    )


def names_of_job(job: SweepJob, monkeypatch: pytest.MonkeyPatch) -> list[str]:

    def facts_of(name: str, *given: Any) -> Any:
        return model_facts(name, *given) if Path(name).is_dir() else embedded_facts()

    def build(self: Workspace, stage: Any, inputs: Any, directory: str) -> Made:
        return Made(self.root / "stages" / directory, {"stage": stage.kind, **MANIFEST}, reused=True)

    monkeypatch.setattr(models, "fingerprint_of", lambda name, *given: {"name": name, "weights": Path(name).name})
    monkeypatch.setattr(models, "model_facts", facts_of)
    monkeypatch.setattr(Workspace, "_build", build)
    monkeypatch.setattr(sweep, "read_records", lambda path: [])
    monkeypatch.setattr(sweep, "check_labels", lambda *given: None)
    mine = study(job)
    make, how = mine.workspace.make, mine.measuring
    mine.prepare()
    for control in mine.controls:
        make(control.evaluation)
    captured, nulls, sums, evaluated = mine.validation
    make(evidence.domains(how, sums, mine.records))
    if len(job.sweep.seeds) > 1:
        recurrence = evidence.recurrence(how, captured, mine.saes, sums)
        make(evidence.stability(how, mine.saes, recurrence, evaluated))
    make(evidence.measured(how, "test", captured, mine.saes, nulls, [SAE]).evaluation)
    row = {name: 0 for name in FACTS} | {"sae_id": SAE, "status": "completed", "site": SITE}
    decision = {"chosen": SAE, "choices": {SITE: {"chosen": SAE}}}
    for _, stage in mine.about_lead(pd.DataFrame([row]), decision):
        make(stage)
    return list(mine.workspace.made)


QUICKSTART = (
    "records-074cba589fd2",
    "tokens-a96a9f713c85",
    "model-93a602f9db6a",
    "store-16a56dbdff04",
    "sweep-cea82964c969",
    "nulls-d45b7fe83c53",
    "measurement-eab39800ad7f",
    "evaluation-4e69c4010db5",
    "domains-062a1e00300c",
    "measurement-65ca5cf623fc",
    "evaluation-692b5ba198b8",
    "features-fdef31883760",
)
GSM_NANO_REPORT = (
    "records-5ba3ba4cfd1d",
    "tokens-935aa691afec",
    "records-fb68ed39262f",
    "tokens-549334f5ba68",
    "store-c5545b86a14d",
    "sweep-a86a441fde2d",
    "nulls-f4ce657a559c",
    "measurement-8c90b6649474",
    "evaluation-4dfed5a6e32b",
    "null_model-70bc3caac46d",
    "store-f7805c00b8a3",
    "nulls-e58ceaf21be8",
    "measurement-af3e6173e444",
    "evaluation-f681c6eb8522",
    "domains-673a509e6055",
    "recurrence-c0484c7e97d6",
    "stability-f56986728db9",
    "measurement-cf31a01eb93e",
    "evaluation-01f86eb7103f",
    "store-35523216cc1d",
    "measurement-f1924b6e2085",
    "evaluation-cb8212386891",
    "transfer-0998b3239e1d",
    "rewording-e6797df038ff",
    "invariance-f069631482cd",
    "probes-b838d1fc31ea",
    "features-5ef426b2a63c",
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


def kinds(names: list[str]) -> set[str]:
    return {name.rpartition("-")[0] for name in names}


OF_INTERVALS = {"evaluation", "domains", "stability", "transfer", "invariance", "features"}


@pytest.mark.parametrize("fields, redone", [
    (["--evaluation.bootstrap", "77"], OF_INTERVALS),
    (["--evaluation.confidence", "0.9"], OF_INTERVALS),
    (["--evaluation.contexts", "7"], {"features"}),
    (["--sweep.target_l0", "[5]", "--sweep.l1_range", "[0.3,0.4]", "--sweep.coefficients", '{"gated": [0.5]}'], set()),
    (["--training.base_learning_rate", "0.5", "--training.learning_rate", "0.1"], None),
    (["--data.text_separator", "x", "--data.columns.question", "y"], set()),
    (["--cluster.num_cpus", "3", "--budget.tokens", "1_000_000_000_000", "--sweep.pack_size", "3"], set()),
    (["--sweep.k", "[16]"], None),
    (["--capture.dtype", "float32"], None),
], ids=lambda value: value[0] if isinstance(value, list) else "")  # fmt: skip
def test_a_stage_is_made_again_only_for_what_it_depends_on(beside_data, monkeypatch, shared, fields, redone):
    """redone: kinds of stages; None: the sweep and all that comes of it."""
    (beside_data / "shared").symlink_to(shared)
    report = CONFIGS / "gsm_nano_report.yaml"
    before, after = (names_of(report, beside_data, monkeypatch, *given) for given in ([], fields))
    changed = kinds([name for name in after if name not in before])
    if redone is None:
        assert {"sweep", "nulls", "measurement", *OF_INTERVALS} <= changed and "records" not in changed
    else:
        assert changed == redone


def test_a_field_that_is_added_later_redoes_nothing_and_leaves_a_named_run_its_own(beside_data, monkeypatch):
    class Training(TrainingConfig):
        later: int = 3

    class Job(SweepJob):
        training: Training = Training()
        more: str = "as ever"

    config = load_config(SweepJob, ["--config", str(CONFIGS / "quickstart.yaml"), "--output", str(beside_data)])
    config = config.model_copy(update={"run": "mine"})
    now = Job(**config.model_dump())
    assert names_of_job(config, monkeypatch) == names_of_job(now, monkeypatch)
    then = study(config)
    then.directory.mkdir()
    write_json(then.directory / "identity.json", then.identity())
    study(now)
    for changed in ({"more": "another"}, {"training": now.training.model_copy(update={"later": 4})}, {"seed": 1}):
        with pytest.raises(UserError, match="belongs to another config"):
            study(now.model_copy(update=changed))
