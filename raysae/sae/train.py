"""The pack trainer: K SAEs in lock-step on one stream of activation batches.

A pack is the only way SAEs are trained; one SAE is a pack of one. Members share the batch and nothing else: each has its
own parameters, Adam state, schedule and dead counter, so its result is what it would have been alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from raysae.sae.architectures import ARCHITECTURES, TRAINED, SAEConfig, initial_parameters
from raysae.sae.formats import load_tensors
from raysae.sae.sae import SAE, fold

ADAM_BETAS, ADAM_EPS, CLIP_NORM = (0.9, 0.999), 1e-8, 1.0


@dataclass(frozen=True)
class Member:
    """One SAE of a pack: its id, what it is, and its peak learning rate."""

    sae_id: str
    config: SAEConfig
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """What the members of a sweep share: steps, batch, and the shape of the schedules (in steps)."""

    steps: int
    batch_size: int
    warmup_steps: int
    decay_steps: int
    l1_warmup_steps: int
    dead_after_tokens: int

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at `step` (0-based): linear up, flat, linear down to 0 over the last steps."""
        up = (step + 1) / max(self.warmup_steps, 1)
        down = (self.steps - step) / max(self.decay_steps, 1)
        return min(1.0, up, down)

    def sparsity_rate(self, step: int) -> float:
        """Share of the sparsity coefficient at `step`: linear up to 1."""
        return min(1.0, (step + 1) / max(self.l1_warmup_steps, 1))


@dataclass(frozen=True)
class InputScale:
    """What the trainer must know of a site: mean [d_in] and mean squared norm of its training rows."""

    mean: Tensor
    mean_square_norm: float

    @property
    def factor(self) -> float:
        """s with mean ‖s·x‖² = 1."""
        return 1 / math.sqrt(self.mean_square_norm)


class _Trained:
    """A member in training, in scaled units."""

    def __init__(self, member: Member, scale: InputScale, device: torch.device) -> None:
        self.member = member
        self.architecture = ARCHITECTURES[member.config.architecture]
        p = initial_parameters(member.config, scale.mean * scale.factor)
        self.parameters = {name: tensor.to(device) for name, tensor in p.items()}
        self.optimizer = torch.optim.Adam(
            [self.parameters[name] for name in TRAINED],
            lr=member.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            fused=True,
        )
        self.silent_tokens = torch.zeros(member.config.d_sae, dtype=torch.int64, device=device)
        self.loss = float("nan")
        self.finite = True

    def step(self, x: Tensor, recipe: Recipe, step: int) -> None:
        p, config = self.parameters, self.member.config
        coefficient = (config.l1_coefficient or 0.0) * recipe.sparsity_rate(step)
        dead = self.dead(recipe)
        out = self.architecture.step(p, config, x, coefficient, dead)
        self.silent_tokens += x.shape[0]
        self.silent_tokens[out.fired] = 0
        self.loss = (out.squared_error / x.shape[0] + coefficient * out.sparsity).item()
        self.finite = math.isfinite(self.loss)
        if not self.finite:
            return
        g = out.gradients
        if self.architecture.constrain_decoder:  # keep the step on the sphere of unit-norm decoder rows
            g["W_dec"] -= (g["W_dec"] * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
        norm = torch.stack([t.norm() for t in g.values()]).norm()
        clip = (CLIP_NORM / norm.clamp_min(1e-12)).clamp_max(1.0)
        for name in TRAINED:
            p[name].grad = g[name].mul_(clip)
        for name, value in out.buffers.items():
            p[name].copy_(value)
        self.optimizer.param_groups[0]["lr"] = self.member.learning_rate * recipe.rate(step)
        self.optimizer.step()
        if self.architecture.constrain_decoder:
            p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True).clamp_min(1e-12)

    def dead(self, recipe: Recipe) -> Tensor:
        return self.silent_tokens >= recipe.dead_after_tokens

    def tensors(self) -> dict[str, Tensor]:
        saved = {f"parameters.{name}": tensor for name, tensor in self.parameters.items()}
        for name, tensor in self.parameters.items():
            for key, value in self.optimizer.state.get(tensor, {}).items():
                saved[f"adam.{name}.{key}"] = value
        return {**saved, "silent_tokens": self.silent_tokens}

    def load(self, saved: dict[str, Tensor]) -> None:
        for name, tensor in self.parameters.items():
            tensor.copy_(saved[f"parameters.{name}"])
            prefix = f"adam.{name}."
            state = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
            if state:
                moments = {k: v.to(tensor.device) for k, v in state.items() if k != "step"}
                self.optimizer.state[tensor] = {"step": state["step"].to(tensor.device), **moments}
        self.silent_tokens.copy_(saved["silent_tokens"])


class Pack:
    """K members trained in lock-step. `train` consumes batches [batch, d_in] of raw activations."""

    def __init__(
        self, members: Sequence[Member], recipe: Recipe, scale: InputScale, device: torch.device | str = "cpu"
    ) -> None:
        self.recipe, self.scale, self.device = recipe, scale, torch.device(device)
        self.step = 0
        self._members = {m.sae_id: _Trained(m, scale, self.device) for m in members}

    @property
    def alive(self) -> list[Member]:
        """Members still in training, in order."""
        return [t.member for t in self._members.values()]

    @property
    def tokens(self) -> int:
        """Token rows each member has trained on."""
        return self.step * self.recipe.batch_size

    @torch.no_grad()
    def train(self, batches: Iterable[Tensor]) -> None:
        """One step per batch. A member whose loss is no longer finite stands still from there on."""
        for batch in batches:
            x = batch.to(self.device, torch.float32, non_blocking=True) * self.scale.factor
            for member in self._members.values():
                if member.finite:
                    member.step(x, self.recipe, self.step)
            self.step += 1

    def drop(self, sae_ids: Iterable[str]) -> None:
        """Stop training these members and free their memory; the rest do not notice."""
        for sae_id in sae_ids:
            del self._members[sae_id]

    def state_of(self, sae_id: str) -> dict[str, float | bool]:
        """Training-side facts: the last step's loss (scaled units), dead share, learning rate, and if it diverged."""
        t = self._members[sae_id]
        return {
            "loss": t.loss,
            "dead_fraction": t.dead(self.recipe).double().mean().item(),
            "learning_rate": t.member.learning_rate * self.recipe.rate(max(self.step - 1, 0)),
            "diverged": not t.finite,
        }

    def sae(self, sae_id: str) -> SAE:
        """The member as it stands, folded to read raw activations."""
        t = self._members[sae_id]
        return SAE(t.member.config, fold(t.parameters, self.scale.factor))

    def save(self, directory: Path) -> None:
        """Write the training state: a tensor file per member and `pack.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        for i, t in enumerate(self._members.values()):
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in t.tensors().items()}, directory / f"{i}.safetensors"
            )
        members = [asdict(t.member) | {"loss": t.loss, "finite": t.finite} for t in self._members.values()]
        facts = {"step": self.step, "recipe": asdict(self.recipe), "members": members}
        (directory / "pack.json").write_text(json.dumps(facts))

    def load(self, directory: Path) -> None:
        """Take up the state that `save` wrote; members that were dropped by then are dropped."""
        facts = json.loads((directory / "pack.json").read_text())
        saved = {m["sae_id"]: m for m in facts["members"]}
        self.drop([sae_id for sae_id in list(self._members) if sae_id not in saved])
        for i, (sae_id, member) in enumerate(saved.items()):
            trained = self._members[sae_id]
            trained.load(load_tensors(directory / f"{i}.safetensors"))
            trained.loss, trained.finite = member["loss"], member["finite"]
        self.step = facts["step"]
