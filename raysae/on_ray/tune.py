"""A sweep over Ray Tune: a trial trains a pack that `PackSearch` proposes, and is stopped when all of it is pruned.

Adapters only: `Searcher` and `StopPruned` hand Tune what the search and the rungs say, `run_trial` is
`trial.train_proposed` with Tune's reports. What a killed driver left is taken up from the sweep's own files (`collect`), in
an experiment of Tune's that is new each time: restoring one needs all of its files whole, and is silently short where one
is missing.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
from ray import tune
from ray.tune import Callback, CLIReporter, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.logger import LoggerCallback, TBXLoggerCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysae.on_ray.cluster import environment_of_workers
from raysae.placement import Placement
from raysae.progress import Progress, say
from raysae.sae.architectures import COEFFICIENTS, SAEConfig
from raysae.sae.losses import Losses
from raysae.sae.train import Member
from raysae.sweep.collect import note_pruned
from raysae.sweep.prune import Pruning, Rungs
from raysae.sweep.search import PackSearch
from raysae.sweep.space import COEFFICIENT
from raysae.sweep.trial import ProposedPack, Rung, Trial, advance, train_proposed

OUT_OF_MEMORY = "out_of_memory"
"""In a trial's last report: its pack did not fit the device."""


class ProposedPacks(Searcher):
    """The packs of a search, as the configs of trials."""

    def __init__(self, search: PackSearch) -> None:
        super().__init__()
        self.search = search
        self.packs: dict[str, ProposedPack] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        pack = self.search.propose()
        if pack is None:
            return None if self.search.may_split else Searcher.FINISHED
        self.packs[trial_id] = pack
        return {"site": pack.site, "members": [asdict(member) for member in pack.members], "state": pack.state}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.search.reported(_metrics_of(result))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pack = self.packs.pop(trial_id, None)
        if pack is None:
            return
        if (result or {}).get(OUT_OF_MEMORY):
            self.search.did_not_fit(pack)
            return
        self.on_trial_result(trial_id, result or {})
        if error:
            self.search.failed(pack)
        else:
            self.search.trained(pack)

    def save(self, checkpoint_path: str) -> None:
        """Tune saves its searchers; this one is never restored from that."""
        Path(checkpoint_path).touch()


class StopPruned(FIFOScheduler):
    """Stops a trial once every SAE of its pack should stop."""

    def __init__(self, root: Path, pruning: Pruning) -> None:
        super().__init__()
        self.root, self.rungs = root, Rungs(root, pruning)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        reasons = {} if result.get("final") else self.rungs.reasons(trial.config["site"], _metrics_of(result))
        if not reasons:
            return TrialScheduler.CONTINUE
        note_pruned(self.root, reasons)
        return TrialScheduler.STOP


class SweepProgress(Callback):
    """Moves the sweep's progress by the tokens that trials report.

    Tune pickles its callbacks with the experiment, so the bar is the class's, not theirs.
    """

    progress: ClassVar[Progress | None] = None
    last: ClassVar[dict[str, dict[str, Any]]] = {}
    """By sae_id, of all SAEs that have reported: its pack reports no more of one that it dropped."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        metrics = _metrics_of(result)
        self.last.update(metrics)
        if self.progress is not None:
            advance(self.progress, self.seen, trial.trial_id, metrics)


def run_trial(config: dict[str, Any], trial: Trial, threads: int, pruning: Pruning) -> None:
    """Tune's trainable: one proposed pack."""
    torch.set_num_threads(threads)
    pack = _pack_of(config)

    def report(rung: Rung) -> dict[str, str]:
        flat = next(iter(rung.metrics.values())) if len(pack.members) == 1 else {"members": rung.metrics}
        tune.report({**flat, "final": rung.final, "timesteps_total": rung.tokens})  # TensorBoard's x axis
        return {}

    if not train_proposed(trial, pack, pruning, report):
        tune.report({OUT_OF_MEMORY: True, "final": True})


def run_sweep(
    search: PackSearch,
    trial: Trial,
    pruning: Pruning,
    placement: Placement,
    max_restarts: int,
    wandb_project: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the sweep, or what is left of it; returns {sae_id: {facts, message}} of SAEs whose trial failed for good."""
    if search.nothing_left:
        return {}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, trial=trial, threads=placement.threads, pruning=pruning),
        {"cpu": placement.cpus, "gpu": placement.gpus},
    )
    path = trial.root / "tune"
    for stale in path.glob("*.*"):  # an earlier experiment's state; its trials' folders stay, with their curves
        if stale.is_file():
            stale.unlink()
    callbacks: list[Callback] = [SweepProgress(), TensorBoard()]
    if wandb_project:
        callbacks.append(_wandb(wandb_project, trial.root))
    tuner = Tuner(
        trainable,
        tune_config=TuneConfig(
            search_alg=ProposedPacks(search),
            scheduler=StopPruned(trial.root, pruning),
            num_samples=search.most_packs,
            max_concurrent_trials=placement.workers,
            reuse_actors=True,
            trial_name_creator=lambda t: _pack_of(t.config).name,
            trial_dirname_creator=lambda t: f"{_pack_of(t.config).name}-{t.trial_id}",
        ),
        run_config=RunConfig(
            name="tune",
            storage_path=str(trial.root),
            failure_config=FailureConfig(max_failures=max_restarts),
            callbacks=callbacks,
            progress_reporter=Table(),
            verbose=1,
        ),
    )
    SweepProgress.last.clear()  # of an earlier sweep in this process
    left = search.saes_left * trial.tokens
    # Tune would hand AWS's secrets to trials, by way of Ray's log.
    with Progress("sweep", left, "SAE-tok") as SweepProgress.progress, environment_of_workers():
        grid = tuner.fit()
    errors: dict[str, dict[str, Any]] = {}
    for result in grid:
        if result.error is not None and result.config:
            errors |= _pack_of(result.config).failure(str(result.error).strip().splitlines()[-1])
    return errors


def _wandb(project: str, root: Path) -> Callback:
    """Weights & Biases, offline where there is no key (env or netrc). Its files lie beside the stage's, without the key."""
    import wandb
    from ray.air.integrations.wandb import WandbLoggerCallback

    class PerSAE(RunPerSAE, WandbLoggerCallback):
        """A run per SAE."""

        def _start_logging_actor(self, *given: Any, **options: Any) -> None:
            """Without the key where the actor has it anyway, in a cluster of ours: handed on, it stands in Ray's log."""
            node = ray._private.worker._global_node
            key = os.environ.pop("WANDB_API_KEY", None) if node is not None and node.is_head() else None
            try:
                super()._start_logging_actor(*given, **options)
            finally:
                if key is not None:
                    os.environ["WANDB_API_KEY"] = key

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    os.environ["WANDB_MODE"] = mode  # asked for by the callback before it would ask for a key
    return PerSAE(project=project, group=root.name, mode=mode, dir=str(root))


class OneSAE:
    """An SAE of a trial, as Tune's loggers and its table would see it if it were a trial of its own."""

    def __init__(self, trial: Any, member: Mapping[str, Any]) -> None:
        self.trial, self.sae_id = trial, str(member["sae_id"])
        c, alone = member["config"], len(trial.config["members"]) == 1
        name = COEFFICIENT[c["architecture"]]
        self.config = {
            "site": trial.config["site"], "architecture": c["architecture"], "d_sae": c["d_sae"],
            "expansion_factor": c["d_sae"] / c["d_in"], name: c[name], "seed": c["seed"],
            "peak_learning_rate": member["learning_rate"],
        }  # fmt: skip
        self.evaluated_params = self.config
        self.trial_id = trial.trial_id if alone else f"{trial.trial_id}-{self.sae_id}"
        self.local_path = trial.local_path if alone else str(Path(trial.local_path) / self.sae_id)

    @property
    def last_result(self) -> dict[str, Any]:
        return self.of(self.trial.last_result) | SweepProgress.last.get(self.sae_id, {})

    def of(self, result: dict[str, Any]) -> dict[str, Any]:
        """Its part of its trial's result."""
        shared = {k: v for k, v in result.items() if k not in ("members", "config") and not k.startswith("members/")}
        return {**shared, **_metrics_of(result).get(self.sae_id, {}), "config": self.config}

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.sae_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OneSAE) and self.trial_id == other.trial_id

    def __hash__(self) -> int:
        return hash(self.trial_id)

    def __getattr__(self, name: str) -> Any:
        if name == "trial":  # not there yet
            raise AttributeError(name)
        return getattr(self.trial, name)


def saes_of(trial: Any) -> list[OneSAE]:
    """The SAEs of a trial, in order."""
    return [OneSAE(trial, member) for member in trial.config["members"]]


class RunPerSAE(LoggerCallback):
    """Before a logger of Tune's among a class's bases: it logs each SAE, not the pack that they train in."""

    def log_trial_start(self, trial: Any) -> None:
        for sae in saes_of(trial):
            super().log_trial_start(sae)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        if isinstance(trial, OneSAE):  # a logger that starts late calls itself
            return super().log_trial_result(iteration, trial, result)
        found = _metrics_of(result)
        for sae in saes_of(trial):
            if sae.sae_id in found:
                super().log_trial_result(iteration, sae, sae.of(result))

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        for sae in saes_of(trial):
            super().log_trial_end(sae, failed)


class TensorBoard(RunPerSAE, TBXLoggerCallback):
    """Event files of each SAE: in its trial's folder, or below it, under its id, where it shares the trial."""


class Table(CLIReporter):
    """Tune's table, a row for each SAE, every minute; printed above the progress bar, not through it."""

    def __init__(self) -> None:
        super().__init__(
            metric_columns=["tokens", "fvu", "l0", "dead_fraction"],
            parameter_columns=["expansion_factor", *COEFFICIENTS, "seed"],
            max_report_frequency=60,
            print_intermediate_tables=True,
        )

    def report(self, trials: list[Any], done: bool, *sys_info: Any) -> None:
        if not any("tokens" in t.last_result or "members" in t.last_result for t in trials):
            return
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            super().report([sae for trial in trials for sae in saes_of(trial)], done, *sys_info)
        say(printed.getvalue().strip())


def _pack_of(config: Mapping[str, Any]) -> ProposedPack:
    """The pack that a trial's config states."""
    members = tuple(
        Member(m["sae_id"], SAEConfig(**m["config"]), m["learning_rate"], Losses(**m["losses"]))
        for m in config["members"]
    )
    return ProposedPack(config["site"], members, config["state"])


def _metrics_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics by sae_id from a trial's report: flat for a pack of one, nested (or flattened by Tune) for others."""
    if "sae_id" in result:
        return {result["sae_id"]: result}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in result.items():
        if key == "members":
            return dict(value)
        if key.startswith("members/"):
            sae_id, name = key.removeprefix("members/").rsplit("/", 1)
            nested.setdefault(sae_id, {})[name] = value
    return nested
