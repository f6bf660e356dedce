"""Sections of a job's config, which studies share; the docstring under each field is its line in `--help`.

Frozen, and validated where they are read: inside, code trusts them. Nothing below the stages depends on these classes:
the core takes plain arguments.
"""

from __future__ import annotations

import os
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import CliImplicitFlag


def _whole(value: Any) -> Any:
    """`1e6`, which YAML and a command line give as text, as the integer that it is; all else as it came."""
    if isinstance(value, str) and len(value) < 64:
        try:
            number = Decimal(value.replace("_", ""))
        except InvalidOperation:
            return value
        if number.is_finite() and number.adjusted() < 18 and number == number.to_integral_value():
            return int(number)
    return value


def _home(value: Any) -> Any:
    """A path, or a name that may be one, with `~` as the home folder that a shell would make of it."""
    found = os.path.expanduser(value)
    if found.startswith("~"):
        raise ValueError(f"{value} names no home folder; write the path in full")
    return type(value)(found)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{value} is given twice")
    return values


Int = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[Int, Field(gt=0)]
Seed = Annotated[Int, Field(ge=0, lt=2**31)]
UserPath = Annotated[Path, AfterValidator(_home)]
Name = Annotated[str, AfterValidator(_home)]
Distinct = AfterValidator(_distinct)
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]

Widths = Annotated[tuple[PositiveFloat, ...], Field(min_length=1), Distinct]
Label = Literal["step", "step_type", "operation", "value", "answer"]
Null = Literal["untrained", "random_encoder", "permuted", "pca", "ica", "shuffled_rows", "untrained_model"]
NULLS: tuple[Null, ...] = get_args(Null)


class Section(BaseModel):
    """A part of a job's config: frozen, no unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )


class Columns(Section):
    """Which columns of a dataset hold what; unset ones are absent."""

    question: str = "question"
    """Column of the question, or of the whole text for corpora."""
    answer: str | None = None
    """Column of the answer; GSM8K's format (annotated steps, then `#### n`) is recognised."""
    steps: str | None = None
    """Column with a list of reasoning steps, where the answer does not hold them."""
    group: str | None = None
    """Column of the unit that a split may not cut."""
    example_id: str | None = None
    """Column of a stable id; the row number otherwise."""


class DataConfig(Section):
    source: Literal["arithmetic", "gsm8k", "text", "dataset"] = "arithmetic"
    """arithmetic: the embedded generator; gsm8k: JSONL at `path`, or openai/gsm8k from the hub; text: plain text files;
    dataset: any local or hub dataset with a column map."""
    path: Name | None = None
    """File, folder, or hub name of the dataset (not for arithmetic)."""
    subset: str | None = None
    """Hub dataset configuration, such as `main`."""
    hub_split: str = "train"
    """Which split of a hub dataset, or which `<split>.jsonl` of a GSM8K folder, to read."""
    columns: Columns = Columns()
    """Column map of `source: dataset`."""
    text_separator: str = r"\n\n+"
    """Regular expression that splits a text file into examples."""
    text_replace: tuple[str, str] | None = None
    """Literal replacement `[old, new]` made in each example of a text file."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read (no JSON, a column that is null or of another type, characters that are none): error names
    it and stops; skip leaves it out and counts it."""
    examples: PositiveInt | None = None
    """How many examples to generate (arithmetic) or to keep at most (others; a seeded sample)."""
    context_length: PositiveInt | None = None
    """Longest sequence in tokens; unset: the model's, up to 512. Under packing `problems` longer examples are left out
    and counted, under `concat` they are cut."""
    packing: Literal["problems", "concat"] = "problems"
    """problems: one example per sequence, so that none attends to another; concat: texts joined with separators."""
    validation_fraction: Fraction = 0.1
    """Share of groups that choose the SAE."""
    test_fraction: Fraction = 0.1
    """Share of groups that measure the chosen SAE, once."""
    near_duplicate_similarity: Fraction | None = 0.8
    """Jaccard similarity of word 3-grams (numbers count as one word) from which two examples share a group; so do those
    that share half as much of the shorter one's 8-grams, as an excerpt does. null turns the search off."""

    @model_validator(mode="after")
    def _splits_leave_training_data(self) -> DataConfig:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must stay below 1")
        if not (self.validation_fraction > 0 and self.test_fraction > 0):
            raise ValueError("validation_fraction and test_fraction must both be above 0")
        return self


class ModelConfig(Section):
    name: Name = "embedded"
    """Hugging Face name or local path of a causal LM, or `embedded`: a small GPT-2 trained on first use."""
    revision: str | None = None
    """Hub revision; pin it for a result that others can repeat."""
    tokenizer: Name | None = None
    """Tokenizer name or path, if not the model's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the hosted model."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read it."""


class CaptureConfig(Section):
    sites: tuple[str, ...] | None = None
    """Sites to capture, such as `blocks.6.resid_post`; the registry's default layer (else the middle one) if unset."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the stored activations."""
    rows_per_shard: PositiveInt = 65_536
    """Token rows per shard: the unit of resume, and the window within which rows are shuffled."""
    tokens_per_forward: PositiveInt = 16_384
    """Padded tokens in one forward pass."""
    max_non_finite_fraction: Fraction = 0.0
    """Share of rows with NaN or inf that is tolerated; tolerated rows are dropped and counted."""
    max_norm_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Rows whose norm is more than so many times the median norm of their shard, at any site, such as 10 for attention
    sinks and massive activations, are dropped and counted; unset: none. CE is measured at their tokens all the same."""


class PruneConfig(Section):
    enabled: bool = True
    """Stop SAEs that are dominated, diverged or collapsed after warm-up; they stay in the table as pruned."""
    grace_fraction: Fraction = 0.5
    """Share of the training tokens before which nothing is judged (never less than the sparsity warm-up)."""
    margin: Fraction = 0.1
    """How much better, relatively, another SAE of its architecture and width must be in both L0 and FVU to dominate."""


class SweepConfig(Section):
    architectures: Annotated[tuple[str, ...], Field(min_length=1), Distinct] = ("relu", "topk")
    """SAE architectures to search: relu, relu_unit_norm, p_anneal, gated (set by l1), topk, abstopk, batchtopk, matryoshka
    (by k), jumprelu (by target_l0), jumprelu_l0, jumprelu_tanh (by l0)."""
    expansion_factors: Widths = (4, 8)
    """d_sae / d_in; `[2,4,...,32]` for the 16 widths of the phased programme. Each is sampled equally often."""
    search: Literal["optuna", "grid"] = "optuna"
    """optuna chooses the coefficients; grid trains every combination."""
    l1_range: tuple[PositiveFloat, PositiveFloat] = (0.02, 0.5)
    """Log-uniform range of L1 coefficients: loss = sum_d (x-x_hat)^2 + l1 sum_j f_j |W_dec_j|, inputs scaled to mean
    |x - mean|^2 = 1 (optuna)."""
    l1_coefficients: Widths = (0.02, 0.06, 0.2)
    """L1 coefficients of the grid."""
    l1_units: str = "unit_norm"
    """Convention in which L1 coefficients are given here: unit_norm (as above), unit_norm_uncentred (inputs of mean
    |x|^2 = 1), sqrt_d (inputs of norm sqrt(d_in)), mean_error (mean over d of the error, z-scored inputs),
    mean_error_mean_latents. The table states them as unit_norm."""
    k_range: tuple[PositiveInt, PositiveInt] = (4, 32)
    """Log-uniform range of k of the TopK family (optuna)."""
    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1), Distinct] = (8, 16, 32)
    """k of the TopK family of the grid."""
    target_l0_range: tuple[PositiveFloat, PositiveFloat] = (4, 32)
    """Log-uniform range of the L0 that a jumprelu is trained to have (optuna)."""
    target_l0: Widths = (8, 16, 32)
    """Target L0s of the grid."""
    l0_range: tuple[PositiveFloat, PositiveFloat] = (0.001, 0.1)
    """Log-uniform range of the L0 coefficients of jumprelu_l0 and jumprelu_tanh (optuna)."""
    l0_coefficients: Widths = (0.003, 0.01, 0.03)
    """L0 coefficients of the grid."""
    ranges: dict[str, tuple[PositiveFloat, PositiveFloat]] = {}
    """Range of an architecture's coefficient in place of the one above, such as {gated: [0.01, 0.1]} (optuna)."""
    coefficients: dict[str, Widths] = {}
    """An architecture's coefficients in place of those above, such as {gated: [0.02, 0.04]} (grid)."""
    samples: PositiveInt = 4
    """SAEs per architecture, expansion factor and seed that Optuna proposes."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds of initialisation; each point is trained once per seed."""
    pack_size: PositiveInt | Literal["auto"] = "auto"
    """SAEs trained in lock-step by one trial; auto: one on CPUs; on GPUs as many, up to eight, as leave
    none of them idle."""
    prune: PruneConfig = PruneConfig()
    """When to stop an SAE early."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> SweepConfig:
        given = {name: getattr(self, name) for name in ("l1_range", "k_range", "target_l0_range", "l0_range")}
        for name, (low, high) in {**given, **{f"ranges.{a}": r for a, r in self.ranges.items()}}.items():
            if low > high:
                raise ValueError(f"{name} must be [low, high], got [{low}, {high}]")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}: the same seed makes the same SAE")
        return self


class LossesConfig(Section):
    decorrelation: NonNegativeFloat = 0.0
    """Weight of the mean squared cosine between decoder rows."""
    max_cosine: NonNegativeFloat = 0.0
    """Weight of a hinge on each decoder row's largest cosine with another."""
    max_cosine_above: Fraction = 0.5
    """Cosine from which that hinge costs."""
    probe: NonNegativeFloat = 0.0
    """Weight of a jointly trained linear probe's cross-entropy for `probe_label`, read from the latents."""
    probe_label: Literal["step"] = "step"
    """Integer column of the token rows that the probe predicts; negative values are no label."""
    temporal: NonNegativeFloat = 0.0
    """Weight of the mean squared change of the latents between neighbouring tokens; batches then hold whole examples."""


class TrainingConfig(Section):
    tokens: PositiveInt = 1_000_000
    """Token rows each SAE trains on, repeats counted; the same for every SAE."""
    batch_size: PositiveInt = 2048
    """Token rows per step."""
    learning_rate: PositiveFloat | None = None
    """Adam's learning rate for every width; unset: base_learning_rate * sqrt(16384 / d_sae)."""
    base_learning_rate: PositiveFloat = 2e-4
    """Learning rate at d_sae = 16384, from which each width's is scaled by 1/sqrt(d_sae)."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    decay_fraction: Fraction = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    sparsity_warmup_fraction: Fraction = 0.1
    """Share of the steps over which the sparsity coefficient rises linearly."""
    dead_after_tokens: PositiveInt = 1_000_000
    """A latent that has not fired for so many training tokens is dead (in runs under 20 times as long: a twentieth
    of theirs)."""
    losses: LossesConfig = LossesConfig()
    """Terms of the loss beside reconstruction and sparsity; all off by default."""
    b_dec: Literal["mean", "geometric_median", "zero"] = "mean"
    """Where the decoder bias starts."""
    initialisation: Literal["random", "rows"] = "random"
    """Where decoder rows point at the start: at random, or from b_dec to activations drawn from the training rows."""
    resample_at: tuple[Fraction, ...] = ()
    """Shares of the training after which dead latents start anew, at badly reconstructed rows. Not in the TopK family and
    JumpReLU (but jumprelu_tanh), whose losses revive them."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 where the hardware gains. Parameters and Adam's state are float32."""
    rungs: PositiveInt = 5
    """How often a trial reports, saves a checkpoint and may be pruned."""


class EvaluationConfig(Section):
    max_tokens: PositiveInt = 50_000
    """Most tokens of a split that are scored with the model (CE, KL). Row metrics use the whole split."""
    bootstrap: PositiveInt = 1000
    """Bootstrap resamples, by group, behind each interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""
    features: Literal["none", "chosen", "all"] = "chosen"
    """Whose latents get densities, contexts, purity and cards: no SAE's, the chosen one's (the closest to the gate's, where
    none is chosen), or all completed SAEs'."""
    feature_rows: PositiveInt = 200_000
    """Most rows of the validation split behind them."""
    contexts: Annotated[Int, Field(ge=2, le=50)] = 10
    """Contexts per latent: as many of its largest activations, and as many random ones where it fires."""
    invariance: Annotated[Int, Field(ge=0)] = 0
    """Examples, such as 100, that are read again with other spaces, names and numbers, to see which latents still fire; 0
    turns it off."""
    nulls: Annotated[tuple[Null | Literal["all"], ...], Field(min_length=1)] = ("untrained", "random_encoder")
    """Controls at each SAE's size and L0. untrained: its start, decoder scaled; random_encoder: another start, decoder
    fitted by least squares; permuted: its decoder rows exchanged; pca, ica: linear codes. One per site and architecture:
    shuffled_rows: trained on rows of shuffled dimensions; untrained_model: on a model of random weights. all: every one."""

    @field_validator("nulls")
    @classmethod
    def _all_in_one_order(cls, given: tuple[str, ...]) -> tuple[Null, ...]:
        return tuple(kind for kind in NULLS if kind in given or "all" in given)


class ProbeFields(Section):
    """How probes are fitted and scored."""

    split: Literal["train", "validation", "test"] = "validation"
    """Whose rows; the SAE was trained on train and chosen on validation; a look at test is counted."""
    rows: PositiveInt = 4000
    """Most rows per label, about as many of every group."""
    folds: Annotated[Int, Field(ge=2)] = 5
    """Folds of the cross-validation by group."""
    ks: Annotated[tuple[PositiveInt, ...], Field(min_length=1), Distinct] = (1, 2, 5, 16)
    """How many latents the sparse probes read."""
    bootstrap: PositiveInt = 500
    """Bootstrap resamples, by group, behind each interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""


class ProbesConfig(ProbeFields):
    labels: Annotated[tuple[Label, ...], Distinct] = ()
    """Labels to probe on the chosen SAE, or the closest; none: no probes. What each says: raysae/data/labels.py."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address to join; unset: the job's or RAY_ADDRESS, else a cluster of this machine."""
    num_cpus: PositiveInt | None = None
    """CPUs of a local cluster; all of the machine's if unset."""
    num_gpus: Annotated[Int, Field(ge=0)] | None = None
    """GPUs to use; all of the cluster's if unset."""
    dashboard: bool = True
    """Start the Ray dashboard with a local cluster."""
    capture_actors: PositiveInt | None = None
    """Hosts of the model during capture and evaluation; unset: one per GPU, or one that uses all CPUs."""
    gpus_per_trial: PositiveFloat = 1.0
    """GPU share of a trial where there are GPUs."""
    cpus_per_trial: PositiveFloat = 1.0
    """CPU share, and torch threads, of a trial."""
    pass_env: tuple[str, ...] = ()
    """Environment variables that workers of a local cluster get beside those of Python, devices, Hugging Face and W&B."""
    keep_ray_logs: CliImplicitFlag[bool] = False
    """Keep the folder of a local cluster's session, with its logs, when it ends; the last line says where."""
    max_restarts: Annotated[Int, Field(ge=0)] = 2
    """How often a block or a trial is tried again after its process died."""


class TrackingConfig(Section):
    wandb_project: str | None = None
    """Log each trial to this Weights & Biases project (offline without a key)."""


class BudgetConfig(Section):
    device_hours: PositiveFloat | None = None
    """Most GPU-hours held by all stages, or CPU-hours where there is no GPU; `--plan` projects them."""
    tokens: PositiveInt | None = None
    """Most tokens processed by all stages, each SAE's training tokens counted. More is refused before it starts."""
    gigabytes: PositiveFloat | None = None
    """Most gigabytes (10^9 bytes) of stages on disk. More is refused before it starts."""


class Job(Section):
    """What every job says beside what it studies."""

    run: str | None = None
    """Name of the run's folder; unset: the config's hash."""
    output: UserPath = Path("results")
    """Root of runs and shared stages; RAYSAE_OUTPUT overrides the default. Absolute under a Ray job."""
    seed: Seed = 0
    """Seed of sampling, splits and shuffles."""
    cluster: ClusterConfig = ClusterConfig()
    """Where work runs. Changes no result, so no stage depends on it."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment trackers beside TensorBoard."""
    budget: BudgetConfig = BudgetConfig()
    """What the run may cost, the stages that it takes from earlier runs included; the ledger says what it did cost."""
    plan: CliImplicitFlag[bool] = False
    """Project hours, devices, disk and tokens from a short calibration on this machine, print them and stop."""
    verify: CliImplicitFlag[bool] = False
    """Compare every file of the run and its stages with its sha256. Without, sizes are, and hashes where something new is
    made from a stage."""

    def identity(self) -> dict[str, Any]:
        """What the run's results depend on: all but where it runs, what it may cost and who is told."""
        where_and_who = {"run", "output", "cluster", "tracking", "budget", "plan", "require_go", "verify"}
        return self.model_dump(mode="json", exclude=where_and_who)


class GatedJob(Job):
    """A job that ends with the verdict of a gate."""

    gate: UserPath = Path("configs/gates/default.yaml")
    """Criteria that the chosen SAE must meet."""
    basis: UserPath | None = None
    """Folder of an earlier run, such as the phase before, on whose go this one builds; it starts on nothing less."""
    waiver: UserPath | None = None
    """YAML file in which a person waives criteria of the gate, or a basis that is no go: waived_by, why, criteria, run."""
    require_go: bool = False
    """Exit with status 3 unless the verdict is go, so that a pipeline stops."""
