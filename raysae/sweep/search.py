"""What a sweep trains next: packs of members from a plan, whose open coefficients Optuna chooses. Knows nothing of Tune."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysae.artifacts import fingerprint
from raysae.progress import say
from raysae.sae.train import Member
from raysae.sweep import collect
from raysae.sweep.space import COEFFICIENT, Common, Proposal, members, range_at, width
from raysae.sweep.trial import ProposedPack

if TYPE_CHECKING:
    import optuna


class PackSearch:
    """Proposes packs of members. Coefficients that the plan leaves open come from Optuna, one study per site and
    architecture, minimising (FVU, L0) together; a proposal's seeds share its coefficient and are told as their mean.

    Whoever trains the packs tells it of their rungs (`reported`) and how each ended: `trained` (those that were stopped
    too), `failed`, or `did_not_fit` its device.

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
        self.root, self.ended = root, dict(ended or {})
        self.plan, self.widths, self.ranges = list(plan), dict(widths), dict(ranges)
        self.seeds, self.common, self.pack_size, self.seed = list(seeds), common, pack_size, seed
        self.queue: dict[str, list[Member]] = defaultdict(list)  # by site, not yet in a pack
        self.next_proposal = 0
        self.proposal_of: dict[str, int] = {}  # index, by sae_id
        self.studies: dict[tuple[str, str], optuna.Study] = {}
        self.open: dict[int, tuple[tuple[str, str], optuna.trial.Trial]] = {}
        self.outcomes: dict[int, list[tuple[float, float] | None]] = defaultdict(list)
        self.in_training: list[ProposedPack] = []
        self.last: dict[str, tuple[float, float]] = {}
        self.proposed: dict[tuple[str, str, float], set[float]] = defaultdict(set)

    @property
    def most_packs(self) -> int:
        """Packs that the plan can make: one per SAE, twice as many where packs may have to be split."""
        return len(self.plan) * len(self.seeds) * (1 if self.pack_size == 1 else 2)

    @property
    def saes_left(self) -> int:
        """SAEs of the plan that had not ended before this search."""
        return max(len(self.plan) * len(self.seeds) - len(self.ended), 0)

    @property
    def nothing_left(self) -> bool:
        """Whether every SAE of the plan has ended."""
        ids = collect.asked(self.plan, self.widths, self.seeds, self.common, self.root) if self.root else None
        return ids is not None and set(ids) <= set(self.ended)

    @property
    def may_split(self) -> bool:
        """Whether a pack in training may yet come back, so that `propose` has something after it had nothing."""
        return any(len(pack.members) > 1 for pack in self.in_training)

    def propose(self) -> ProposedPack | None:
        """The next pack to train; None where there is none for now (`may_split`), or none any more."""
        while (together := self._next_members()) is not None:
            left = tuple(member for member in together[1] if member.sae_id not in self.ended)
            if left:
                pack = ProposedPack(together[0], left, fingerprint([member.sae_id for member in together[1]]))
                self.in_training.append(pack)
                return pack
        return None

    def _next_members(self) -> tuple[str, list[Member]] | None:
        """A site and the next members to train together there, those that have ended among them, so that a pack is the same
        whenever it is made; None where there are none."""
        while self.next_proposal < len(self.plan) and not any(len(q) >= self.pack_size for q in self.queue.values()):
            proposal = self.plan[self.next_proposal]
            self.next_proposal += 1
            made = members(proposal, self._coefficient(proposal), self.widths[proposal.site], self.seeds, self.common)
            self.queue[proposal.site] += made
            for member in made:
                self.proposal_of[member.sae_id] = proposal.index
                if member.sae_id in self.ended:
                    rung = self.ended[member.sae_id]
                    self._tell(member, (rung["fvu"], rung["l0"]))
        ready = [site for site, queue in self.queue.items() if len(queue) >= self.pack_size]
        ready = ready or [site for site, queue in self.queue.items() if queue]
        if not ready:
            return None
        queue = self.queue[ready[0]]
        self.queue[ready[0]] = queue[self.pack_size :]
        return ready[0], queue[: self.pack_size]

    def _coefficient(self, proposal: Proposal) -> float:
        if proposal.coefficient is not None:
            return proposal.coefficient
        import optuna  # a grid does without

        key = (proposal.site, proposal.architecture)
        if key not in self.studies:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
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
            self._forget(key, trial)
            trial, value = ask({name: other})
        if self.root and noted is None:
            collect.note_proposal(self.root, proposal.index, value)
        taken.add(value)
        self.open[proposal.index] = (key, trial)
        return value

    def _forget(self, key: tuple[str, str], trial: optuna.trial.Trial) -> None:
        """Let Optuna learn nothing of a trial."""
        from optuna.trial import TrialState

        self.studies[key].tell(trial, state=TrialState.FAIL)

    def reported(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Hear of a rung: metrics by sae_id. A member that its pack drops is judged by its last one."""
        for sae_id, at_rung in metrics.items():
            self.last[sae_id] = (at_rung["fvu"], at_rung["l0"])

    def trained(self, pack: ProposedPack) -> None:
        """Hear that nothing of a pack is left to train."""
        self._end(pack, failed=False)

    def failed(self, pack: ProposedPack) -> None:
        """Hear that a pack failed for good."""
        self._end(pack, failed=True)

    def did_not_fit(self, pack: ProposedPack) -> None:
        """Take back a pack that its device has no room for: its members come again, in packs of half the size."""
        self.in_training.remove(pack)
        self.pack_size = min(self.pack_size, max(1, len(pack.members) // 2))
        self.queue[pack.site] += pack.members
        say(
            f"sweep: {pack.name} ran out of device memory; its {len(pack.members)} SAEs go on in packs of "
            f"{self.pack_size}"
        )

    def _end(self, pack: ProposedPack, failed: bool) -> None:
        self.in_training.remove(pack)
        for member in pack.members:
            pair = self.last.pop(member.sae_id, (float("nan"), float("nan")))
            self._tell(member, None if failed else pair)

    def _tell(self, member: Member, pair: tuple[float, float] | None) -> None:
        """Note (FVU, L0) of one of a proposal's SAEs, None for one that failed; Optuna hears of it when all are there."""
        index = self.proposal_of[member.sae_id]
        self.outcomes[index].append(None if pair is None or any(v != v for v in pair) else pair)
        if index in self.open and len(self.outcomes[index]) == len(self.seeds):
            key, trial = self.open.pop(index)
            good = [o for o in self.outcomes[index] if o is not None]
            if good:
                self.studies[key].tell(trial, [sum(v) / len(good) for v in zip(*good, strict=True)])
            else:
                self._forget(key, trial)
