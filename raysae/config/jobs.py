"""The main job, and the jobs on its runs."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field
from pydantic_settings import CliImplicitFlag, CliPositionalArg

from raysae.config.sections import (
    CaptureConfig,
    DataConfig,
    Distinct,
    EvaluationConfig,
    GatedJob,
    Label,
    ModelConfig,
    ProbeFields,
    ProbesConfig,
    Section,
    Seed,
    SweepConfig,
    TrainingConfig,
    UserPath,
)  # fmt: skip


class SweepJob(GatedJob):
    """raysae: find the right sparse autoencoder for a language model on a Ray cluster, and show the evidence."""

    data: DataConfig = DataConfig()
    """Where the text comes from."""
    model: ModelConfig = ModelConfig()
    """The language model."""
    capture: CaptureConfig = CaptureConfig()
    """How activations are stored."""
    sweep: SweepConfig = SweepConfig()
    """Which SAEs are trained."""
    training: TrainingConfig = TrainingConfig()
    """How each SAE is trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How each SAE is measured."""
    probes: ProbesConfig = ProbesConfig()
    """What is read from the latents of the chosen SAE, beside the baselines that it must beat."""
    transfer: dict[str, DataConfig] = Field(default={})
    """Other datasets by a name of your own, such as {stories: {source: text, path: ...}}: all of each is held out, and the
    chosen SAE and its seeds are measured there as well."""


class ProbeJob(ProbeFields):
    """raysae: what can be read from an SAE's latents, beside the baselines that it must beat. `results/<run>/probes/`."""

    run: CliPositionalArg[UserPath]
    """A run's directory, such as results/<run>."""
    labels: Annotated[tuple[Label, ...], Field(min_length=1), Distinct] = get_args(Label)
    """Labels to probe, separated by commas; what each says: raysae/data/labels.py."""
    sae: str | None = None
    """Id of the SAE; unset: the chosen one, or the closest to the gate where none was chosen."""
    untrained: UserPath | None = None
    """A run on an untrained model with the same data and tokenizer; its SAE becomes a baseline. Unset: the run's own, where
    it measured the null untrained_model."""
    seed: Seed = 0
    """Seed of the sample, the shuffled labels, the random SAE and the resamples."""


class ReplicateJob(Section):
    """raysae: run a finished run again from what it recorded, into an empty folder, and compare the two."""

    run: CliPositionalArg[UserPath]
    """A run's directory, such as results/<run>; what was found is written there, as replication.json."""
    output: UserPath | None = None
    """Root for the new run and its stages; unset: replications/<run> beside the run. Nothing is reused."""
    exact: CliImplicitFlag[bool] = False
    """Exit with 3 unless every bit is the same, as a CPU gives it with the same packages and threads."""


class GateJob(Section):
    """raysae: print a run's decision and what was waived; exit 0 on a go and 3 on anything else."""

    run: CliPositionalArg[UserPath]
    """A run's directory, such as results/<run>."""


class BundleJob(Section):
    """raysae: put all that an auditor of a run needs into one archive, with the sha256 of each part."""

    run: CliPositionalArg[UserPath]
    """A run's directory, such as results/<run>."""
    to: UserPath | None = None
    """The archive, ending in .tar.gz; unset: <run>.tar.gz beside the run."""
    weights: CliImplicitFlag[bool] = False
    """Add the SAEs' weights; their hashes are always there."""
