"""A stage's folder is named by what goes in: an older run's stages are found again as long as their names stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysae import stages
from raysae.activations import store as stores
from raysae.artifacts import Stage, stage_path
from raysae.config import SweepJob, load_config
from raysae.evidence import Controls
from raysae.flow import Flow
from raysae.models.embedded import embedded_facts
from raysae.models.host import model_facts

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SAE = "000-relu-x4"
FACTS: dict[str, Any] = {
    "largest_id": 0, "blocks": [], "context_length": 96, "rows": {"train": 8, "validation": 1}, "left_out": {},
    "not_compared": None, "nulls": {}, "separator_id": 0,
}  # fmt: skip


class FakeStore:
    """What naming a sweep asks of a store."""

    sites = ("blocks.2.resid_post",)

    def __init__(self, path: Path) -> None: ...

    def d_model(self, site: str) -> int:
        return 64

    def offset(self, site: str) -> float:
        return 1.0

    def check_model(self, model: Any) -> None: ...


def facts_of(name: str, *given: Any) -> Any:
    """Of a model that is there, else of the embedded one."""
    return model_facts(name, *given) if Path(name).is_dir() else embedded_facts()


def names_of(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of a job's stages in the order of the flow, without making any; weights are called as their folder."""
    monkeypatch.setattr(stages, "fingerprint_of", lambda name, *given: {"name": name, "weights": Path(name).name})
    monkeypatch.setattr(stages, "model_facts", lambda name, *given: facts_of(name, *given))
    monkeypatch.setattr(stores, "Store", FakeStore)
    named: list[str] = []

    def name(self: Flow, kind: str, inputs: dict[str, Any], build: Any) -> Stage:
        version = stages.STAGE_VERSIONS[kind.removeprefix("transfer_")]
        path = stage_path(tmp_path, kind, {"version": version, **inputs})
        named.append(path.name)
        return Stage(path, {"stage": kind, **FACTS}, reused=True)

    monkeypatch.setattr(Flow, "_stage", name)
    monkeypatch.setattr(Flow, "_check_labels", lambda *given: None)
    job = load_config(SweepJob, ["--config", str(config), "--output", str(tmp_path)])
    flow = Flow(job)
    records, tokens, away = flow.prepare()
    model = flow.model()
    store = flow.store(tokens, model)
    saes = flow.saes(store, tokens)
    nulls = flow._own_nulls(saes, store, tokens)
    validation = flow.evaluation("validation", saes, store, tokens, model, nulls)
    other: Controls | None = None
    if "untrained_model" in job.evaluation.nulls:
        other = flow._untrained_model(saes, tokens, model)
    flow.domains(validation, tokens, records, FakeStore.sites)
    if len(job.sweep.seeds) > 1:
        flow.stability(saes, validation, store, tokens, model)
    flow.evaluation("test", saes, store, tokens, model, nulls, [SAE])
    if away:
        flow.transfer(saes, validation, tokens, model, [SAE], FakeStore.sites[0], away)
    if job.evaluation.invariance:
        flow.invariance(saes, records, tokens, model, SAE, FakeStore.sites[0])
    if job.probes.labels:
        flow.probes(SAE, FakeStore.sites[0], saes, records, store, other)
    flow.features(SAE, FakeStore.sites[0], saes, store, tokens, records, model)
    return named

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
