"""The sweep over Ray Tune: a trial trains a pack, Optuna proposes coefficients, dominated SAEs are stopped.

Three small adapters: `PackSearch` hands Tune one pack after another and tells Optuna how its members did;
`StopDominated` is a scheduler that applies `prune.reason_to_stop`; `run_trial` is `trial.train_pack` with Tune's
reports. What a killed driver left is taken up from the sweep's own files (`collect`), in an experiment of Tune's that is
new each time: restoring one needs all of its files whole, and is silently short where one is missing.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import optuna
import ray
import torch
from ray import tune
from ray.tune import Callback, CLIReporter, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.logger import LoggerCallback, TBXLoggerCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysae.artifacts import fingerprint
from raysae.files import write_json
from raysae.on_ray.cluster import environment_of_workers
from raysae.placement import Placement, device
from raysae.progress import Progress, say
from raysae.sae.architectures import COEFFICIENTS, SAEConfig
from raysae.sae.losses import Losses
from raysae.sae.train import Member
from raysae.sweep import collect
from raysae.sweep.prune import Standing, reason_to_stop
from raysae.sweep.replay import Stop
from raysae.sweep.space import COEFFICIENT, Common, Proposal, members, range_at, width
from raysae.sweep.trial import Rung, Trial, keep_state, last_state, train_pack

OUT_OF_MEMORY = "out_of_memory"
"""In a trial's last report: its pack did not fit the device."""


class PackSearch(Searcher):
    """Hands out packs of members. Coefficients that the plan leaves open come from Optuna, one study per site and
    architecture, minimising (FVU, L0) together; a proposal's seeds share its coefficient and are told as their mean.

    Below `root` it notes what Optuna chose, and finds what it chose before: a search that is taken up proposes the same
    again. SAEs that have `ended`, by id with their last rung, are told to Optuna and not handed out.
    """

    def __init__(
        self,
        plan: Sequence[Proposal],
        widths: Mapping[str, int],
        ranges: Mapping[str, tuple[float, float]],
        seeds: Sequence[int],
        common: Common,
        pack_size: int,
        seed: int,
        root: Path | None = None,
        ended: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.root, self.ended = root, dict(ended or {})
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.plan, self.widths, self.ranges = list(plan), dict(widths), dict(ranges)
        self.seeds, self.common, self.pack_size, self.seed = list(seeds), common, pack_size, seed
        self.queue: dict[str, list[tuple[int, Member]]] = defaultdict(list)  # members by site, not yet in a pack
        self.next_proposal = 0
        self.studies: dict[tuple[str, str], optuna.Study] = {}
        self.open: dict[int, tuple[tuple[str, str], optuna.trial.Trial]] = {}
        self.outcomes: dict[int, list[tuple[float, float] | None]] = defaultdict(list)
        self.packs: dict[str, list[tuple[int, Member]]] = {}
        self.sites: dict[str, str] = {}
        self.last: dict[str, tuple[float, float]] = {}
        self.proposed: dict[tuple[str, str, float], set[float]] = defaultdict(set)

    @property
    def most_trials(self) -> int:
        """Trials that the plan can make: one per SAE, twice as many where packs may have to be split."""
        return len(self.plan) * len(self.seeds) * (1 if self.pack_size == 1 else 2)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    @property
    def nothing_left(self) -> bool:
        """Whether every SAE of the plan has ended."""
        ids = collect.asked(self.plan, self.widths, self.seeds, self.common, self.root) if self.root else None
        return ids is not None and set(ids) <= set(self.ended)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        while (found := self._next_pack()) is not None:
            site, whole = found
            pack = [(index, member) for index, member in whole if member.sae_id not in self.ended]
            if pack:
                return self._as_config(trial_id, site, pack, fingerprint([member.sae_id for _, member in whole]))
        # a pack in training may yet come back to be split
        return None if any(len(pack) > 1 for pack in self.packs.values()) else Searcher.FINISHED

    def _next_pack(self) -> tuple[str, list[tuple[int, Member]]] | None:
        """The next members to train together, those that have ended among them, so that a pack is the same whenever it is
        made; None where there are none."""
        while self.next_proposal < len(self.plan) and not any(len(q) >= self.pack_size for q in self.queue.values()):
            proposal = self.plan[self.next_proposal]
            self.next_proposal += 1
            made = members(proposal, self._coefficient(proposal), self.widths[proposal.site], self.seeds, self.common)
            self.queue[proposal.site] += [(proposal.index, member) for member in made]
            for member in made:
                if member.sae_id in self.ended:
                    rung = self.ended[member.sae_id]
                    self._tell(proposal.index, (rung["fvu"], rung["l0"]))
        ready = [site for site, queue in self.queue.items() if len(queue) >= self.pack_size]
        ready = ready or [site for site, queue in self.queue.items() if queue]
        if not ready:
            return None
        site = ready[0]
        pack, self.queue[site] = self.queue[site][: self.pack_size], self.queue[site][self.pack_size :]
        return site, pack

    def _as_config(self, trial_id: str, site: str, pack: list[tuple[int, Member]], state: str) -> dict[str, Any]:
        self.packs[trial_id], self.sites[trial_id] = pack, site
        return {"site": site, "members": [asdict(member) for _, member in pack], "state": state}

    def _coefficient(self, proposal: Proposal) -> float:
        if proposal.coefficient is not None:
            return proposal.coefficient
        key = (proposal.site, proposal.architecture)
        if key not in self.studies:
            sampler = optuna.samplers.TPESampler(seed=self.seed + len(self.studies))
            self.studies[key] = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        study = self.studies[key]
        expansions = sorted({p.expansion_factor for p in self.plan})
        name = COEFFICIENT[proposal.architecture]
        d_sae = width(proposal.expansion_factor, self.widths[proposal.site])
        low, high = range_at(proposal.architecture, self.ranges[proposal.architecture], d_sae)

        def ask(fixed: dict[str, float]) -> tuple[optuna.trial.Trial, float]:
            study.enqueue_trial({"expansion_factor": proposal.expansion_factor, **fixed})
            trial = study.ask()
            trial.suggest_categorical("expansion_factor", expansions)  # fixed: every width equally often
            if name == "k":
                return trial, trial.suggest_int(name, int(low), int(high), log=True)
            return trial, trial.suggest_float(name, low, high, log=True)

        trial, value = ask({})
        noted = collect.noted_proposal(self.root, proposal.index) if self.root else None
        taken = self.proposed[(*key, proposal.expansion_factor)]
        free = set(range(int(low), int(high) + 1)) - taken if name == "k" else set()
        if noted is not None:
            other = noted
        elif value in taken and free:  # k is an integer: rather than the same SAE again, the nearest not there yet
            other = min(free, key=lambda k: (abs(k - value), k))
        else:
            other = value
        if other != value:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            trial, value = ask({name: other})
        if self.root and noted is None:
            collect.note_proposal(self.root, proposal.index, value)
        taken.add(value)
        self.open[proposal.index] = (key, trial)
        return value

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        for sae_id, found in _metrics_of(result).items():  # a member that its pack drops is judged by its last rung
            self.last[sae_id] = (found["fvu"], found["l0"])

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pack = self.packs.pop(trial_id, [])
        if (result or {}).get(OUT_OF_MEMORY):  # its members come again, in packs of half the size
            self.pack_size = min(self.pack_size, max(1, len(pack) // 2))
            self.queue[self.sites[trial_id]] += pack
            say(f"sweep: {trial_id} ran out of device memory; its {len(pack)} SAEs go on in packs of {self.pack_size}")
            return
        self.on_trial_result(trial_id, result or {})
        for index, member in pack:
            sae_id = member.sae_id
            pair = self.last.pop(sae_id, (float("nan"), float("nan")))
            self._tell(index, None if error else pair)

    def _tell(self, index: int, pair: tuple[float, float] | None) -> None:
        """Note (FVU, L0) of one of a proposal's SAEs, None for one that failed; Optuna hears of it when all are there."""
        self.outcomes[index].append(None if pair is None or any(v != v for v in pair) else pair)
        if index in self.open and len(self.outcomes[index]) == len(self.seeds):
            key, trial = self.open.pop(index)
            good = [o for o in self.outcomes[index] if o is not None]
            if good:
                self.studies[key].tell(trial, [sum(v) / len(good) for v in zip(*good, strict=True)])
            else:
                self.studies[key].tell(trial, state=optuna.trial.TrialState.FAIL)

    def save(self, checkpoint_path: str) -> None:
        """Tune saves its searchers; this one is never restored from that."""
        Path(checkpoint_path).touch()


class StopDominated(FIFOScheduler):
    """Stops a trial once every SAE of its pack should stop, by `prune.reason_to_stop` against all SAEs at its rung."""

    def __init__(self, root: Path, margin: float, after_tokens: float) -> None:
        super().__init__()
        self.root, self.margin, self.after_tokens = root, margin, after_tokens
        self.rungs: dict[tuple[str, int], dict[str, Standing]] = defaultdict(dict)
        for rung in collect.history(root).to_dict("records"):  # of an earlier driver
            self.rungs[rung["site"], rung["tokens"]] |= {s.sae_id: s for s in _standings({rung["sae_id"]: rung})}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        found = _metrics_of(result)
        if not found or result.get("final"):
            return TrialScheduler.CONTINUE
        standings = _standings(found)
        tokens = next(iter(found.values()))["tokens"]
        rung = self.rungs[trial.config["site"], tokens]
        rung.update({s.sae_id: s for s in standings})
        if tokens < self.after_tokens:
            return TrialScheduler.CONTINUE
        reasons = {s.sae_id: reason_to_stop(s, list(rung.values()), self.margin) for s in standings}
        if not all(reasons.values()):
            return TrialScheduler.CONTINUE
        _note_pruned(self.root, {sae_id: str(reason) for sae_id, reason in reasons.items()})
        return TrialScheduler.STOP


class SweepProgress(Callback):
    """Moves the sweep's progress by the tokens that trials report.

    Tune pickles its callbacks with the experiment, so the bar is the class's, not theirs.
    """

    progress: ClassVar[Progress | None] = None
    last: ClassVar[dict[str, dict[str, Any]]] = {}
    """By sae_id, of all SAEs that have reported: its pack reports no more of one that it dropped."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = defaultdict(int)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        found = _metrics_of(result)
        self.last.update(found)
        total = sum(m["tokens"] for m in found.values())
        last = next(reversed(found.values()), {"fvu": float("nan"), "l0": float("nan"), "sae_id": ""})
        note = f"{last['sae_id']}: FVU {last['fvu']:.3f}, L0 {last['l0']:.1f}"
        if self.progress is not None:
            self.progress.advance(max(total - self.seen[trial.trial_id], 0), note)
        self.seen[trial.trial_id] = max(total, self.seen[trial.trial_id])


def run_trial(
    config: dict[str, Any],
    trial: Trial,
    threads: int,
    margin: float | None,
    after_tokens: float,
    stops: Mapping[str, Stop] | None = None,
) -> None:
    """Tune's trainable: one pack from its last rung's state, if it has one, to the end."""
    torch.set_num_threads(threads)
    pack = [
        Member(m["sae_id"], SAEConfig(**m["config"]), m["learning_rate"], Losses(**m["losses"]))
        for m in config["members"]
        if collect.pruned(trial.root, m["sae_id"]) is None
    ]
    if not pack:
        return
    state = trial.root / "state" / config["state"]

    def report(rung: Rung) -> Iterable[str]:
        flat = next(iter(rung.metrics.values())) if len(config["members"]) == 1 else {"members": rung.metrics}
        metrics = {**flat, "final": rung.final, "timesteps_total": rung.tokens}  # TensorBoard's x axis
        if rung.final:
            tune.report(metrics)
            return []
        keep_state(state, rung)
        tune.report(metrics)
        reasons = {i: s.reason for i, s in (stops or {}).items() if i in rung.metrics and rung.tokens >= s.tokens}
        if len(rung.metrics) > 1 and margin is not None and rung.tokens >= after_tokens:
            standings = _standings(rung.metrics)
            reasons |= {s.sae_id: reason for s in standings if (reason := reason_to_stop(s, standings, margin))}
        _note_pruned(trial.root, reasons)
        return reasons

    try:
        train_pack(trial, config["site"], pack, report, last_state(state), device())
        shutil.rmtree(state, ignore_errors=True)
    except torch.OutOfMemoryError:
        if len(pack) == 1:
            raise
        tune.report({OUT_OF_MEMORY: True, "final": True})


def run_sweep(
    search: PackSearch,
    trial: Trial,
    placement: Placement,
    max_restarts: int,
    prune_margin: float | None,
    prune_after_tokens: float,
    wandb_project: str | None = None,
    stops: Mapping[str, Stop] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the sweep, or what is left of it; returns {sae_id: {facts, message}} of SAEs whose trial failed for good.

    `stops`, of a replay, say which SAEs are stopped after how many tokens, in place of `prune_margin`.
    """
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial,
            trial=trial,
            threads=placement.threads,
            margin=prune_margin,
            after_tokens=prune_after_tokens,
            stops=stops,
        ),
        {"cpu": placement.cpus, "gpu": placement.gpus},
    )
    if search.nothing_left:
        return {}
    left = max(len(search.plan) * len(search.seeds) - len(search.ended), 0)
    total = left * trial.recipe.steps * trial.recipe.batch_size
    path = trial.root / "tune"
    for stale in path.glob("*.*"):  # an earlier experiment's state; its trials' folders stay, with their curves
        if stale.is_file():
            stale.unlink()
    callbacks: list[Callback] = [SweepProgress(), TensorBoard()]
    if wandb_project:
        callbacks.append(_wandb(wandb_project, trial.root))
    scheduler = FIFOScheduler() if prune_margin is None else StopDominated(trial.root, prune_margin, prune_after_tokens)
    tuner = Tuner(
        trainable,
        tune_config=TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=search.most_trials,
            max_concurrent_trials=placement.workers,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=lambda t: f"{_trial_name(t)}-{t.trial_id}",
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
    # Tune would hand AWS's secrets to trials, by way of Ray's log.
    with Progress("sweep", total, "SAE-tok") as SweepProgress.progress, environment_of_workers():
        grid = tuner.fit()
    errors = {}
    for result in grid:
        if result.error is not None:
            message = str(result.error).strip().splitlines()[-1]
            for member in (result.config or {}).get("members", []):
                errors[member["sae_id"]] = {**member["config"], "site": result.config["site"], "message": message}
    return errors


def train_whole(trial: Trial, site: str, pack: Sequence[Member], threads: int = 1) -> None:
    """Train a pack to its end, none of it stopped early; in halves where it does not fit the device."""
    torch.set_num_threads(threads)
    try:
        train_pack(trial, site, pack, lambda rung: [], device=device())
    except torch.OutOfMemoryError:
        if len(pack) == 1:
            raise
        for half in (pack[: len(pack) // 2], pack[len(pack) // 2 :]):
            train_whole(trial, site, half, threads)


def train_packs(
    what: str, trial: Trial, packs: Mapping[str, Sequence[Member]], placement: Placement, max_restarts: int
) -> None:
    """Train one pack per site side by side, placed as trials are, outside Tune: nothing is searched or pruned."""
    task = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=max_restarts)(train_whole)
    running = {task.remote(trial, site, pack, placement.threads): len(pack) for site, pack in packs.items()}
    with Progress(what, sum(running.values()), "SAE") as progress:
        while running:
            (done,), _ = ray.wait(list(running))
            ray.get(done)
            progress.advance(running.pop(done))


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

    def log_trial_result(self, iteration: int, trial: Any, result: dict) -> None:
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

    def report(self, trials: list, done: bool, *sys_info: Any) -> None:
        if not any("tokens" in t.last_result or "members" in t.last_result for t in trials):
            return
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            super().report([sae for trial in trials for sae in saes_of(trial)], done, *sys_info)
        say(printed.getvalue().strip())


def _trial_name(trial: Any) -> str:
    first = trial.config["members"][0]["sae_id"]
    return first if len(trial.config["members"]) == 1 else f"pack-{first.split('-')[0]}"


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


def _standings(metrics: Mapping[str, Mapping[str, Any]]) -> list[Standing]:
    return [Standing(i, m["architecture"], m["d_sae"], m["fvu"], m["l0"]) for i, m in metrics.items()]


def _note_pruned(root: Path, reasons: Mapping[str, str | None]) -> None:
    (root / "pruned").mkdir(parents=True, exist_ok=True)
    for sae_id, reason in reasons.items():
        write_json(root / "pruned" / f"{sae_id}.json", {"reason": reason})
