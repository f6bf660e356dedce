"""The SAEs: what a sweep trains, and the nulls that stand beside each."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from raysae import __version__
from raysae.activations.store import Store
from raysae.data.sources import GSM8K_HUB
from raysae.errors import Fault, UserError
from raysae.evaluate import nulls as null_saes
from raysae.files import write_atomic
from raysae.models.foreign import saelens_hooks
from raysae.placement import pack_size
from raysae.progress import say
from raysae.sae.conventions import L1_UNITS
from raysae.sae.losses import Losses
from raysae.sae.train import Recipe
from raysae.stages.work import add_cost, of_driver
from raysae.sweep.collect import asked, curves, ended, training_table
from raysae.sweep.prune import Pruning
from raysae.sweep.replay import Replay
from raysae.sweep.search import PackSearch
from raysae.sweep.space import COEFFICIENT, Common, Proposal, check_space, proposals, recipe, width
from raysae.sweep.trial import Start, Trial
from raysae.workspace import FAILED, Inputs, Stage

if TYPE_CHECKING:
    from raysae.bench import Bench
    from raysae.config.sections import DataConfig, SweepConfig, TrainingConfig
    from raysae.stages.model import Model
    from raysae.stages.store import Captured

FAR = 3.0
"""‖mean‖ over √E‖x - mean‖² of activations, from which the log speaks of it."""
OF_TRAINING = (
    "tokens", "batch_size", "learning_rate", "warmup_fraction", "decay_fraction", "sparsity_warmup_fraction",
    "dead_after_tokens", "losses", "b_dec", "initialisation", "resample_at", "precision", "rungs",
)  # fmt: skip
"""Fields of the training that SAEs depend on."""
STATED = {
    "l1_coefficient": ("l1_coefficients", "l1_range"),
    "k": ("k", "k_range"),
    "target_l0": ("target_l0", "target_l0_range"),
    "l0_coefficient": ("l0_coefficients", "l0_range"),
}
"""Fields of the sweep that state a coefficient's values in a grid, and its range for Optuna."""


@dataclass(frozen=True)
class Sweep:
    """Which SAEs are trained, and how. With a `replay` its points are trained, and SAEs stopped where it says, in place of
    searching and pruning. UserError for an architecture or unit that there is not."""

    config: SweepConfig
    training: TrainingConfig
    seed: int
    replay: Replay | None = None

    def __post_init__(self) -> None:
        s = self.config
        for field, names, known in (
            ("architectures", s.architectures, COEFFICIENT),
            ("ranges", s.ranges, COEFFICIENT),
            ("coefficients", s.coefficients, COEFFICIENT),
            ("l1_units", [s.l1_units], L1_UNITS),
        ):
            for name in names:
                if name not in known:
                    raise UserError(f"sweep.{field}: {name!r} is not allowed; allowed: {', '.join(known)}")

    def coefficients(self, architecture: str) -> tuple[str, Sequence[float]]:
        """The field that states an architecture's coefficients in this search, and what it states: the values of a grid, or
        a range for Optuna."""
        s, grid = self.config, self.config.search == "grid"
        own: Mapping[str, Sequence[float]] = s.coefficients if grid else s.ranges
        if architecture in own:
            return f"{'coefficients' if grid else 'ranges'}.{architecture}", own[architecture]
        field = STATED[COEFFICIENT[architecture]][0 if grid else 1]
        return field, getattr(s, field)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Of the coefficients that Optuna chooses, by architecture."""
        s = self.config
        return {a: s.ranges.get(a, getattr(s, STATED[COEFFICIENT[a]][1])) for a in s.architectures}

    def points(self, widths: Mapping[str, int]) -> tuple[list[Proposal], list[str]]:
        """The plan of the sweep over sites of these widths (d_in by site), and what to say of it."""
        if self.replay:
            return list(self.replay.plan), []
        s = self.config
        stated = {a: self.coefficients(a) for a in s.architectures}
        grid = {a: values for a, (_, values) in stated.items()} if s.search == "grid" else None
        cut = check_space(widths, s.architectures, s.expansion_factors, stated, s.samples if grid is None else None)
        return proposals(widths, s.architectures, s.expansion_factors, grid, s.samples), cut

    @property
    def recipe(self) -> Recipe:
        """How each SAE is trained."""
        t = self.training
        return recipe(
            t.tokens, t.batch_size, t.warmup_fraction, t.decay_fraction, t.sparsity_warmup_fraction, t.dead_after_tokens,
            t.resample_at, t.precision,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Training tokens of each SAE."""
        return self.recipe.steps * self.recipe.batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """What its SAEs depend on beside the store: of the coefficients, those of the architectures that are trained."""
        s, t = self.config, self.training
        l1 = any(COEFFICIENT[a] == "l1_coefficient" for a in s.architectures)
        searched = {a: list(self.coefficients(a)[1]) for a in s.architectures}
        trained = t.model_dump(mode="json", include=set(OF_TRAINING))
        trained |= {"base_learning_rate": t.base_learning_rate} if t.learning_rate is None else {}
        if self.replay:
            return {"replay": self.replay.fingerprint, "training": trained, "seed": self.seed}
        return {
            "architectures": list(s.architectures),
            "expansion_factors": list(s.expansion_factors),
            "search": s.search,
            "coefficients": searched,
            "l1_units": s.l1_units if l1 else None,
            "samples": s.samples if s.search == "optuna" else None,
            "seeds": list(s.seeds),
            "prune": s.prune.model_dump(mode="json", include={"grace_fraction", "margin"}) if s.prune.enabled else None,
            "training": trained,
            "seed": self.seed,
        }

    @property
    def pruning(self) -> Pruning:
        s, t = self.config, self.training
        grace = max(s.prune.grace_fraction, t.sparsity_warmup_fraction, t.warmup_fraction)
        margin = s.prune.margin if s.prune.enabled and not self.replay else None
        return Pruning(margin, grace * self.tokens, self.replay.stops if self.replay else {})

    def common(self, store: Store) -> Common:
        """What its SAEs have in common; `store` tells how many labels a probe in the loss has."""
        t = self.training
        classes = store.label_count("train", t.losses.probe_label) if t.losses.probe > 0 else 0
        losses = Losses(**t.losses.model_dump(exclude={"probe_label"}), probe_classes=classes)
        units = "unit_norm" if self.replay else self.config.l1_units  # a replay's are converted
        return Common(t.learning_rate, t.base_learning_rate, losses, units, {s: store.offset(s) for s in store.sites})

    def trial(self, store: Path, root: Path, metadata: dict[str, Any], rungs: int | None = None) -> Trial:
        """What its trials share, writing below `root`."""
        t = self.training
        label = t.losses.probe_label if t.losses.probe > 0 else None
        start = Start(t.b_dec, t.initialisation == "rows")
        return Trial(
            Store(store), self.recipe, rungs or t.rungs, self.seed, root, metadata, start, label, t.losses.temporal > 0
        )

    def pack_size(self, bench: Bench, widths: Mapping[str, int]) -> int:
        """SAEs in a trial on a bench: see `placement.pack_size`."""
        size, placement = self.config.pack_size, bench.trials()
        if size != "auto" or not placement.gpus:
            return 1 if size == "auto" else size
        points = self.points(widths)[0]
        at = Counter(point.site for point in points)
        d_in, d_sae = max((widths[p.site], width(p.expansion_factor, widths[p.site])) for p in points)
        each = [n * len(self.config.seeds) for n in at.values()]
        return pack_size(each, placement, d_in, d_sae, self.training.batch_size, bench.device_bytes)


def saes(sweep: Sweep, captured: Captured, data: DataConfig | None = None) -> Stage:
    """The sweep: `saes/`, `history/`, `table.parquet`, `curves.parquet`, and Tune's own `tune/`."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        opened, seeds = Store(inputs["store"].path), sweep.config.seeds
        widths = {site: opened.d_model(site) for site in opened.sites}
        plan, cut = sweep.points(widths)
        common, placement = sweep.common(opened), bench.trials()
        together = sweep.pack_size(bench, widths)
        for line in [*cut, *far_from_zero(common.offsets)]:
            say(line)
        there = ended(path, sweep.tokens)
        if there:
            say(f"sweep: {len(there)} SAEs are there already")
        search = PackSearch(plan, widths, sweep.ranges, seeds, common, together, sweep.seed, path, there)
        packed = f"in packs of {together}, " if together > 1 else ""
        say(
            f"sweep: {len(plan) * len(seeds)} SAEs of {sweep.tokens:,} tokens each, {packed}"
            f"{placement.workers} at once; watch: tensorboard --logdir {path / 'tune'}"
        )
        errors = bench.search(search, trial_of(sweep, inputs, captured.model, data, path), sweep.pruning)
        ids = asked(plan, widths, seeds, common, path)
        if ids is None:
            raise Fault("sweep: it ended before every SAE was proposed; the same command goes on from here")
        dead_after = sweep.recipe.dead_after_tokens
        table = training_table(path, errors, ids, sweep.tokens, opened.rows("train"), dead_after)
        if not (table["status"] != "error").any():
            raise Fault(f"sweep: every trial failed; the first: {table['status_reason'].iloc[0]}")
        failed = table[table["status"] == "error"].set_index("sae_id")["status_reason"].to_dict()
        if failed:
            say(f"sweep: {len(failed)} of {len(ids)} SAEs failed; the run goes on without, a rerun tries them again")
        else:
            shutil.rmtree(path / "state", ignore_errors=True)
        rungs = curves(path)  # by rename: a run may hold links to what was here when SAEs of it had failed
        write_atomic(path / "table.parquet", lambda file: table.to_parquet(file, index=False))
        write_atomic(path / "curves.parquet", lambda file: rungs.to_parquet(file, index=False))
        cost = replace(placement, workers=1).held(float(table["train_seconds"].sum()))
        return {"saes": len(table), FAILED: failed, "cost": {"tokens": int(table["tokens"].sum()), **cost}}

    implied = frozenset(captured.inputs) - {"store"}
    return Stage("sweep", 9, sweep.identity, captured.inputs, build, implied=implied)


def nulls(kinds: Sequence[str], sweep: Sweep, saes: Stage, captured: Captured, data: DataConfig | None = None) -> Stage:
    """Nulls of these kinds, beside the SAEs that they are compared with, made from its store: `saes/`, named in the
    manifest."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        spent = {"tokens": 0, "cpu_seconds": 0.0, "gpu_seconds": 0.0}
        begun, trained = perf_counter(), [0.0]

        def train(trial: Trial, packs: Mapping[str, Sequence[Any]]) -> None:
            what = f"train nulls{' on shuffled rows' if trial.shuffled else ''}"
            trained.append(bench.train(what, trial, packs))
            placement = bench.trials()
            at_once = replace(placement, workers=min(placement.workers, len(packs)))
            add_cost(spent, at_once.held(trained[-1]))
            spent["tokens"] += trial.recipe.steps * trial.recipe.batch_size * sum(map(len, packs.values()))

        say(f"nulls: {', '.join(kinds)}")
        peers, losses = null_saes.peers(inputs["saes"].path), sweep.common(Store(inputs["store"].path)).losses
        trial = trial_of(sweep, inputs, captured.model, data, path)
        facts = null_saes.build(path, kinds, peers, trial, losses, sweep.seed, train)
        add_cost(spent, of_driver(perf_counter() - begun - sum(trained)))
        for name in (name for name, null in facts.items() if not null["made"]):
            say(f"nulls: the training of {name} diverged; it is left out")
        return {"nulls": facts, "cost": spent}

    inputs = {"saes": saes, **captured.inputs}
    settings = {"kinds": list(kinds), "seed": sweep.seed}
    return Stage("nulls", 4, settings, inputs, build, implied=frozenset(inputs) - {"saes", "store"})


def far_from_zero(offsets: Mapping[str, float]) -> list[str]:
    """What to say of sites whose mean outweighs what varies about it, by their `Store.offset`."""
    ratios = {site: math.sqrt(max(offset**2 - 1, 0.0)) for site, offset in offsets.items()}
    return [
        f"sweep: {site}: the norm of the mean activation is {ratio:.3g} times what varies about it; b_dec takes it, and "
        "inputs are scaled by what varies"
        for site, ratio in ratios.items()
        if ratio > FAR
    ]


def trial_of(sweep: Sweep, inputs: Inputs, model: Model | None, data: DataConfig | None, root: Path) -> Trial:
    """The trial of a run's SAEs or nulls."""
    store = inputs["store"].path
    metadata: dict[str, Any] = {"raysae_version": __version__, "raysae_store": store.name}
    hooks: dict[str, dict[str, Any]] = {}
    if model is not None:
        of_model, hooks = saelens_metadata(inputs, model, data)
        metadata |= of_model
    return replace(sweep.trial(store, root, metadata), hooks=hooks)


def saelens_metadata(
    inputs: Inputs, model: Model, data: DataConfig | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What SAELens needs to run an SAE's model, and nothing of this machine: a model or dataset that is not on the hub has
    no name here. `raysae_model` identifies it by its weights. And by site: the class that SAELens loads the model with, as
    what, and where it reads."""
    tokens, hosted, name = inputs["tokens"].manifest, model.fingerprint(inputs), None
    if data is not None and (data.path is None or not Path(data.path).exists()):
        name = GSM8K_HUB[0] if data.source == "gsm8k" and data.path is None else data.path
    metadata = {
        "model_name": hosted["name"] if hosted["revision"] is not None else None,
        "context_size": tokens["context_length"],
        "prepend_bos": tokens["separator_id"] is not None,
        "exclude_special_tokens": True,
        "dataset_path": name,
        "raysae_model": model.identity(inputs),
    }
    as_loaded: dict[str, Any] = {"dtype": model.dtype}
    if hosted["revision"] is not None:
        as_loaded["revision"] = hosted["revision"]
    if model.trust_remote_code:
        as_loaded["trust_remote_code"] = True
    as_published = {"dtype": model.dtype, "center_writing_weights": False}
    loading = {"HookedTransformer": as_published, "AutoModelForCausalLM": as_loaded}
    sites = tuple(inputs["store"].manifest["sites"])
    hooks = {
        site: {**hook._asdict(), "model_from_pretrained_kwargs": loading[hook.model_class_name]}
        for site, hook in saelens_hooks(model.at(inputs), sites, model.revision, model.trust_remote_code).items()
    }
    return metadata, hooks
