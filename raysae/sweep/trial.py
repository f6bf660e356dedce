"""A trial: train one pack on a source's rows from start to end, reporting at rungs. Knows nothing of Tune."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from raysae.activations.source import Source
from raysae.files import plain, read_json, whole_folder, write_atomic, write_json
from raysae.placement import device
from raysae.progress import Progress
from raysae.sae import formats
from raysae.sae.architectures import COEFFICIENTS
from raysae.sae.losses import Batch
from raysae.sae.metrics import RowSums
from raysae.sae.train import InputScale, Member, Pack, Recipe, geometric_median
from raysae.sweep.collect import note_pruned, pruned, read_rungs
from raysae.sweep.prune import Pruning

T = TypeVar("T")
SAMPLE_ROWS = 8192
"""Validation rows on which a rung measures FVU and L0."""


@dataclass(frozen=True)
class Rung:
    """What a trial reports: tokens seen, metrics by sae_id, whether training is over, and a way to save its state."""

    tokens: int
    metrics: dict[str, dict[str, Any]]
    final: bool
    save: Callable[[Path], None]


@dataclass(frozen=True)
class Start:
    """Where SAEs start: b_dec at the `mean`, `geometric_median` or `zero`, latents at random or at training rows."""

    b_dec: str = "mean"
    at_rows: bool = False


@dataclass(frozen=True)
class Trial:
    """What every trial of a sweep shares."""

    source: Source
    recipe: Recipe
    rungs: int
    stream_seed: int
    root: Path
    """Of the sweep: finished SAEs go to `saes/<sae_id>/`, each rung's metrics to `history/<sae_id>.jsonl`."""
    metadata: dict[str, Any]
    """SAELens metadata of every SAE: model_name, context_size, ..."""
    hooks: Mapping[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)
    """By site: SAELens' metadata of where it is found, model_class_name and hook_name among them."""
    start: Start = field(default_factory=Start)
    label: str | None = None
    """Row column that a probe-guided loss reads."""
    neighbours: bool = False
    """Whether batches hold whole examples in order, for a loss on neighbouring tokens."""
    shuffled: bool = False
    """Whether each dimension of a batch is shuffled over its rows: a null, trained on what has no structure."""

    @property
    def tokens(self) -> int:
        """Token rows that each SAE is trained on."""
        return self.recipe.steps * self.recipe.batch_size


def train_pack(
    trial: Trial,
    site: str,
    members: Sequence[Member],
    report: Callable[[Rung], Iterable[str]],
    resume: Path | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Train `members` on `site`, calling `report` at each rung, and save each SAE when its tokens are done.

    `report` returns the members to drop; the rest go on undisturbed, and training ends when none is left. `resume` is a
    directory that a rung's `save` filled; from one that cannot be read, that lacks a member, or whose rungs are not in the
    history, the pack begins anew. The stream is a function of its seed and the step, so a resumed run sees the batches it
    would have seen, and ends (on a CPU) with the same bits.
    """
    source, recipe = trial.source, trial.recipe
    scale = input_scale(source, site, trial.start)
    pack, seconds = _begin(trial, resume, lambda: Pack(members, recipe, scale, device))
    for member in members:
        _cut_history(trial, member.sae_id, pack.tokens)
    sample = source.head(site, "validation", SAMPLE_ROWS).to(pack.device, torch.float32)
    first = next(_stream(trial, site, 0))
    stream = _stream(trial, site, pack.step)
    if pack.device.type == "cuda":
        stream = ahead(stream, lambda batch: _on_device(batch, pack.device))
    for goal in _rungs(recipe.steps, trial.rungs):
        if goal <= pack.step and not (goal == recipe.steps == pack.step):
            continue
        start = time.perf_counter()
        pack.train(islice(stream, goal - pack.step))
        if pack.device.type == "cuda":
            torch.cuda.synchronize(pack.device)
        seconds += time.perf_counter() - start
        facts = {"tokens": pack.tokens, "train_seconds": seconds / len(pack.alive), "site": site}
        metrics = {m.sae_id: facts | _describe(m) | _measure(pack, m, sample, first) for m in pack.alive}
        final = goal == recipe.steps
        for member in pack.alive:
            _append_history(trial, metrics[member.sae_id])
            if final and not metrics[member.sae_id]["diverged"]:
                _save_sae(trial, pack, site, member)

        def save(directory: Path, spent: float = seconds) -> None:
            pack.save(directory)
            write_json(directory / "trial.json", {"train_seconds": spent})

        pack.drop(report(Rung(pack.tokens, metrics, final, save)))
        if not pack.alive:
            return


@dataclass(frozen=True)
class ProposedPack:
    """SAEs that a search wants trained together on a site."""

    site: str
    members: tuple[Member, ...]
    state: str
    """Folder of their training state: the same whenever the same pack is proposed, whichever of it have ended."""

    @property
    def name(self) -> str:
        """Of a single SAE its id."""
        first = self.members[0].sae_id
        return first if len(self.members) == 1 else f"pack-{first.split('-')[0]}"

    def failure(self, message: str) -> dict[str, dict[str, Any]]:
        """By sae_id, what is known of SAEs that failed for good: their facts and the `message`."""
        return {m.sae_id: {**asdict(m.config), "site": self.site, "message": message} for m in self.members}


def train_proposed(
    trial: Trial, pack: ProposedPack, pruning: Pruning, report: Callable[[Rung], Mapping[str, str]]
) -> bool:
    """Train a proposed pack from its last rung's state, if it has one, to the end, less what was pruned before.

    `report` hears of each rung, when its state is kept, and may say which SAEs are to stop, and why, besides those that
    `pruning` stops; after the last rung nothing can be. Returns False where a pack of several does not fit the device.
    """
    members = [member for member in pack.members if pruned(trial.root, member.sae_id) is None]
    if not members:
        return True
    state = trial.root / "state" / pack.state

    def at_rung(rung: Rung) -> Iterable[str]:
        if rung.final:
            report(rung)
            return []
        keep_state(state, rung)
        reasons = {**pruning.reasons(rung.tokens, rung.metrics), **report(rung)}
        note_pruned(trial.root, reasons)
        return reasons

    try:
        train_pack(trial, pack.site, members, at_rung, last_state(state), device())
    except torch.OutOfMemoryError:
        if len(members) == 1:
            raise
        return False
    shutil.rmtree(state, ignore_errors=True)
    return True


def advance(progress: Progress, seen: dict[str, int], pack: str, metrics: dict[str, dict[str, Any]]) -> None:
    """Move the sweep's progress by what a pack has trained on since it was `seen`, which holds tokens by pack."""
    total = sum(m["tokens"] for m in metrics.values())
    last = next(reversed(metrics.values()), {"fvu": float("nan"), "l0": float("nan"), "sae_id": ""})
    progress.advance(max(total - seen.get(pack, 0), 0), f"{last['sae_id']}: FVU {last['fvu']:.3f}, L0 {last['l0']:.1f}")
    seen[pack] = max(total, seen.get(pack, 0))


def train_whole(trial: Trial, site: str, pack: Sequence[Member]) -> None:
    """Train a pack to its end, none of it stopped early; in halves where it does not fit the device."""
    try:
        train_pack(trial, site, pack, lambda rung: [], device=device())
    except torch.OutOfMemoryError:
        if len(pack) == 1:
            raise
        halves = pack[: len(pack) // 2], pack[len(pack) // 2 :]
    else:
        return
    for half in halves:
        train_whole(trial, site, half)


def keep_state(folder: Path, rung: Rung) -> None:
    """Save a rung's state in a folder of its own below `folder`, whole or not at all; older ones go when it is there."""
    with whole_folder(folder / f"{rung.tokens:015d}") as directory:
        rung.save(directory)
    for older in sorted(folder.iterdir())[:-1]:
        shutil.rmtree(older, ignore_errors=True)


def last_state(folder: Path) -> Path | None:
    """The state that `keep_state` saved last, if any."""
    return max(folder.glob("[0-9]*"), default=None)


def _begin(trial: Trial, state: Path | None, make: Callable[[], Pack]) -> tuple[Pack, float]:
    """A pack with a state loaded, and the seconds it has trained; a new one where that, or its history, is not whole."""
    if state is not None:
        pack = make()
        members = pack.alive
        try:
            pack.load(state)
            seconds = float(read_json(state / "trial.json")["train_seconds"])
            known = [{rung["tokens"] for rung in read_rungs(_history_of(trial, m.sae_id))} for m in members]
            if pack.alive == members and all(pack.tokens in tokens for tokens in known):
                return pack, seconds
        except torch.OutOfMemoryError:
            raise
        except Exception:  # half a state can raise anything
            pass
        del pack
    return make(), 0.0


def _cut_history(trial: Trial, sae_id: str, tokens: int) -> None:
    """Leave the rungs up to `tokens`, from which a trial goes on: those after them it writes again."""
    path = _history_of(trial, sae_id)
    if path.exists():
        kept = "".join(_line(rung) for rung in read_rungs(path) if rung["tokens"] <= tokens)
        write_atomic(path, lambda temporary: temporary.write_text(kept))


def input_scale(source: Source, site: str, start: Start = Start()) -> InputScale:
    """What the trainer must know of a site's training rows; medians and starting rows come from a sample of them."""
    mean = source.mean(site).to(torch.float32)
    sample = source.head(site, "train", SAMPLE_ROWS) if start.at_rows or start.b_dec == "geometric_median" else None
    centre = None
    if start.b_dec == "zero":
        centre = torch.zeros_like(mean)
    elif start.b_dec == "geometric_median" and sample is not None:
        centre = geometric_median(sample).to(torch.float32)
    return InputScale(mean, source.variance(site), centre, sample if start.at_rows else None)


def _stream(trial: Trial, site: str, start: int) -> Iterator[torch.Tensor | Batch]:
    """Training batches from step `start` on."""
    batches = _stored(trial, site, start)
    if not trial.shuffled:
        return batches
    return (
        unpaired(b, (trial.stream_seed, step))
        if isinstance(b, torch.Tensor)
        else b._replace(x=unpaired(b.x, (trial.stream_seed, step)))
        for step, b in enumerate(batches, start)
    )


def unpaired(x: torch.Tensor, seed: Sequence[int]) -> torch.Tensor:
    """x [rows, d] with each column's values in another order: marginals stay, what dimensions share does not.

    Rows are permuted, then each column is rolled by its own distance: no two values of a row stay together while there are
    as many rows as columns. A permutation per column would cost a sort of all of x at every step.
    """
    rows, d = x.shape
    rng = np.random.default_rng(seed)
    shift = rng.permutation(rows)[:d] if d <= rows else rng.integers(0, rows, d)
    place = (torch.arange(rows)[:, None] + torch.from_numpy(shift)) % rows
    order = torch.from_numpy(rng.permutation(rows))
    return x.gather(0, order[place].to(x.device))


def _stored(trial: Trial, site: str, start: int) -> Iterator[torch.Tensor | Batch]:
    size, seed = trial.recipe.batch_size, trial.stream_seed
    if trial.label is None and not trial.neighbours:
        return trial.source.batches(site, "train", size, seed=seed, start=start)
    rows = trial.source.labelled_batches(
        site, "train", size, trial.label or "position", neighbours=trial.neighbours, seed=seed, start=start
    )
    return (
        Batch(x, labels if trial.label else None, follows if trial.neighbours else None) for x, labels, follows in rows
    )


def ahead(items: Iterator[T], prepare: Callable[[T], T], depth: int = 2) -> Iterator[T]:
    """`items`, prepared by a thread that keeps up to `depth` of them ready: reading and copying overlap the steps."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    ended = threading.Event()

    def put(item: Any) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                put((prepare(item), None))
                if ended.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # the consumer's to see
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        ended.set()
        thread.join()


def _on_device(batch: torch.Tensor | Batch, device: torch.device) -> torch.Tensor | Batch:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    if isinstance(batch, torch.Tensor):
        return move(batch)
    labels, follows = (None if t is None else move(t) for t in batch[1:])
    return Batch(move(batch.x), labels, follows)


def _rungs(steps: int, rungs: int) -> list[int]:
    return sorted({max(1, round(steps * (i + 1) / rungs)) for i in range(rungs)})


def _describe(member: Member) -> dict[str, Any]:
    c = member.config
    return {
        "sae_id": member.sae_id,
        "architecture": c.architecture,
        "d_in": c.d_in,
        "d_sae": c.d_sae,
        "expansion_factor": c.d_sae / c.d_in,
        **{name: float("nan") if getattr(c, name) is None else getattr(c, name) for name in COEFFICIENTS},
        "seed": c.seed,
        "peak_learning_rate": member.learning_rate,
    }


def _measure(pack: Pack, member: Member, sample: torch.Tensor, batch: torch.Tensor | Batch) -> dict[str, Any]:
    """FVU and L0 of the SAE as it would be saved, on the validation sample, and the trainer's own facts; what share of
    the gradient each loss term has, on a training batch."""
    sae = pack.sae(member.sae_id)
    sums = RowSums(pack.scale.mean)
    sums.add(sample, *sae.reconstruct(sample))
    found = sums.metrics()
    shares = {f"share_{term}": share for term, share in pack.gradient_shares(member.sae_id, batch).items()}
    return {"fvu": found["fvu"], "l0": found["l0"], **pack.state_of(member.sae_id), **shares}


def _history_of(trial: Trial, sae_id: str) -> Path:
    return trial.root / "history" / f"{sae_id}.jsonl"


def _append_history(trial: Trial, metrics: dict[str, Any]) -> None:
    """One line per rung."""
    path = _history_of(trial, metrics["sae_id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(_line(metrics))


def _line(rung: dict[str, Any]) -> str:
    return json.dumps(plain(rung), allow_nan=False) + "\n"


def _save_sae(trial: Trial, pack: Pack, site: str, member: Member) -> None:
    sae = pack.sae(member.sae_id)
    sae.metadata.update(trial.metadata | trial.hooks.get(site, {}) | {"raysae_site": site})
    provenance = {"training": trial.recipe.__dict__ | {"learning_rate": member.learning_rate}}
    formats.save(sae, trial.root / "saes" / member.sae_id, provenance)
