"""The pack trainer: K SAEs in lock-step on one stream of activation batches.

A pack is the only way SAEs are trained; one SAE is a pack of one. Members share the batch and nothing else: each has its
own parameters, Adam state, schedule and dead counter, so its result is what it would have been alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from raysae.files import plain
from raysae.sae.architectures import ARCHITECTURES, Moment, Parameters, SAEConfig, initial_parameters
from raysae.sae.formats import load_tensors
from raysae.sae.losses import Batch, Losses, decorrelation, max_cosine, probe, temporal
from raysae.sae.sae import SAE, fold

ADAM_BETAS, ADAM_EPS, CLIP_NORM = (0.9, 0.999), 1e-8, 0.01
"""Gradients are clipped to this norm, which most exceed, and stated in units of it. With norm 1, Adam's second moment
remembers the first steps' large gradients for the thousand steps of its β2 = 0.999, and a short training stands still:
stories260K, 500k tokens, TopK k = 16: FVU 0.053 against 0.049; ReLU: 0.130 at L0 18 against 0.116 at L0 9."""
HEAD = ("probe.weight", "probe.bias")


@dataclass(frozen=True)
class Member:
    """One SAE of a pack: its id, what it is, its peak learning rate, and loss terms beyond its architecture's."""

    sae_id: str
    config: SAEConfig
    learning_rate: float
    losses: Losses = field(default_factory=Losses)


@dataclass(frozen=True)
class Recipe:
    """What the members of a sweep share: steps, batch, and the shape of the schedules (in steps)."""

    steps: int
    batch_size: int
    warmup_steps: int
    decay_steps: int
    sparsity_warmup_steps: int
    dead_after_tokens: int
    resample_steps: tuple[int, ...] = ()
    """Steps after which dead latents of architectures that revive none themselves start anew."""
    precision: str = "float32"
    """Of the matrix products: float32, bfloat16, or auto. Parameters and Adam's state are float32 always."""

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at `step` (0-based): linear up, flat, linear down to 0 over the last steps."""
        up = (step + 1) / max(self.warmup_steps, 1)
        down = (self.steps - step) / max(self.decay_steps, 1)
        return min(1.0, up, down)

    def sparsity_rate(self, step: int) -> float:
        """Share of the sparsity coefficient at `step`: linear up to 1."""
        return min(1.0, (step + 1) / max(self.sparsity_warmup_steps, 1))


@dataclass(frozen=True)
class InputScale:
    """What the trainer must know of a site, from its training rows, in their own units."""

    mean: Tensor
    """[d_in]"""
    variance: float
    """E‖x - mean‖²: of what varies, since b_dec takes the mean away. A constant added to all rows changes no training."""
    centre: Tensor | None = None
    """Where b_dec starts [d_in]; the mean if None."""
    rows: Tensor | None = None
    """[n, d_in] rows at which the latents start to point; at random if None."""

    @property
    def factor(self) -> float:
        """s with mean ‖s·(x - mean)‖² = 1."""
        return 1 / math.sqrt(self.variance)


def untrained(config: SAEConfig, scale: InputScale) -> SAE:
    """The SAE of `config` before its first step, in units of raw activations: it knows only their mean and variance."""
    return SAE(config, fold(initial_parameters(config, scale.mean * scale.factor), scale.factor))


def geometric_median(rows: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [d_in] with the least sum of distances to rows [n, d_in], by Weiszfeld's algorithm, float64."""
    rows = rows.double()
    centre = rows.mean(0)
    for _ in range(steps):
        weight = 1 / (rows - centre).norm(dim=1).clamp_min(1e-12)
        before, centre = centre, weight @ rows / weight.sum()
        if (centre - before).norm() <= tolerance * centre.norm():
            break
    return centre


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. `auto` is bfloat16 where the hardware multiplies it faster, else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = (
            getattr(torch.cpu, "_is_amx_tile_supported", bool)()
            or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        )
    return torch.bfloat16 if fast else torch.float32


class _Trained:
    """A member in training, in scaled units."""

    def __init__(self, member: Member, scale: InputScale, device: torch.device, dtype: torch.dtype) -> None:
        self.member, self.dtype = member, dtype
        self.architecture = ARCHITECTURES[member.config.architecture]
        centre = scale.mean if scale.centre is None else scale.centre
        rows = None if scale.rows is None else scale.rows.to(torch.float32) * scale.factor
        p = initial_parameters(member.config, centre * scale.factor, rows)
        self.trained = self.architecture.trained
        if member.losses.probe > 0:
            p["probe.weight"] = torch.zeros(member.config.d_sae, member.losses.probe_classes)
            p["probe.bias"] = torch.zeros(member.losses.probe_classes)
            self.trained = (*self.trained, *HEAD)
        self.parameters = {name: tensor.to(device) for name, tensor in p.items()}
        at_rate: dict[float, list[Tensor]] = {}
        for name in self.trained:
            at_rate.setdefault(self.architecture.rates.get(name, 1.0), []).append(self.parameters[name])
        groups = [{"params": tensors, "rate": rate} for rate, tensors in at_rate.items()]
        self.optimizer = torch.optim.Adam(groups, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
        self.silent_tokens = torch.zeros(member.config.d_sae, dtype=torch.int64, device=device)
        self.loss = float("nan")
        self.finite = True

    def moment(self, recipe: Recipe, step: int) -> Moment:
        dead = self.dead(recipe) if self.architecture.revives else None
        return Moment(recipe.sparsity_rate(step), step / recipe.steps, dead, self.dtype)

    def gradients(
        self, batch: Batch, moment: Moment, losses: Losses, step: int
    ) -> tuple[Parameters, dict[str, Tensor], Tensor, Parameters]:
        """(gradients, loss by term, which latents fired, new buffers) of the architecture's loss and `losses`."""
        p, extra, terms = self.parameters, {}, {}

        def on_latents(f: Tensor) -> Tensor:
            g_f = torch.zeros((), dtype=f.dtype, device=f.device)
            if losses.probe > 0 and batch.labels is not None:
                weight, bias = (p[name] for name in HEAD)
                value, g, extra["probe.weight"], extra["probe.bias"] = probe(f, weight, bias, batch.labels)
                terms["probe"], g_f = losses.probe * value, g_f + losses.probe * g
            if losses.temporal > 0 and batch.follows is not None:
                value, g = temporal(f, batch.follows)
                terms["temporal"], g_f = losses.temporal * value, g_f + losses.temporal * g
            return g_f

        if losses.on_latents:
            moment = replace(moment, latent_terms=on_latents)
        out = self.architecture.step(p, self.member.config, batch.x, moment)
        g = out.gradients | extra
        if losses.decorrelation > 0:
            value, g_W_dec = decorrelation(p["W_dec"])
            g["W_dec"] += losses.decorrelation * g_W_dec
            terms["decorrelation"] = losses.decorrelation * value
        if losses.max_cosine > 0:
            value, g_W_dec = max_cosine(p["W_dec"], losses.max_cosine_above, step)
            g["W_dec"] += losses.max_cosine * g_W_dec
            terms["max_cosine"] = losses.max_cosine * value
        return g, out.terms | terms, out.fired, out.buffers

    def step(self, batch: Batch, recipe: Recipe, step: int) -> None:
        p = self.parameters
        g, terms, fired, buffers = self.gradients(batch, self.moment(recipe, step), self.member.losses, step)
        self.silent_tokens += batch.x.shape[0]
        self.silent_tokens.masked_fill_(fired, 0)
        self.loss = sum(terms.values(), torch.zeros(())).item()
        self.finite = math.isfinite(self.loss)
        if not self.finite:
            return
        if self.architecture.constrain_decoder:  # keep the step on the sphere of unit-norm decoder rows
            g["W_dec"] -= (g["W_dec"] * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
        trained = [name for name in self.trained if name in g]
        norm = torch.stack([g[name].norm() for name in trained]).norm()
        for name in trained:
            p[name].grad = g[name].div_(norm.clamp_min(CLIP_NORM))
        for name, value in buffers.items():
            p[name].copy_(value)
        for group in self.optimizer.param_groups:
            group["lr"] = self.member.learning_rate * recipe.rate(step) * group["rate"]
        self.optimizer.step()
        if self.architecture.constrain_decoder:
            p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True).clamp_min(1e-12)
        if step + 1 in recipe.resample_steps and not self.architecture.revives:
            self.resample(batch.x, recipe, step)

    def resample(self, x: Tensor, recipe: Recipe, step: int) -> None:
        """Point dead latents at rows that are badly reconstructed (Bricken et al. 2023, appendix "Neuron Resampling").

        Rows of the batch are drawn with probability ∝ loss². A dead latent's decoder row becomes x - b_dec at the living
        ones' mean norm, its encoder column the same at 0.2 of theirs, its other parameters what they started as, Adam's
        moments 0.
        """
        p, config, dead = self.parameters, self.member.config, self.dead(recipe)
        index = dead.nonzero().squeeze(1)
        if not 0 < index.numel() < config.d_sae:
            return
        f = self.architecture.encode(p, config, x)
        loss = (x - torch.addmm(p["b_dec"], f, p["W_dec"])).square().sum(1)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        drawn = torch.multinomial(loss.square().cpu(), index.numel(), replacement=True, generator=generator)
        direction = x[drawn.to(x.device)] - p["b_dec"]
        direction /= direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
        start = initial_parameters(config, p["b_dec"])
        for name in self.architecture.trained:
            tensor, axis = p[name], 1 if name == "W_enc" else 0
            if name == "b_dec":
                continue
            if name == "W_dec":
                fresh = direction * tensor[~dead].norm(dim=1).mean()
            elif name == "W_enc":
                fresh = direction.T * (0.2 * tensor[:, ~dead].norm(dim=0).mean())
            else:
                fresh = start[name].to(tensor)[index]
            tensor.index_copy_(axis, index, fresh)
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[tensor][moment].index_fill_(axis, index, 0.0)
        self.silent_tokens.masked_fill_(dead, 0)

    def gradient_shares(self, batch: Batch, recipe: Recipe, step: int) -> dict[str, float]:
        """By loss term, the norm of its own gradient over the sum of these norms: whether a coefficient does anything."""
        whole, losses = self.moment(recipe, step), self.member.losses
        none = replace(whole, sparsity=0.0, dead=None)
        terms = self.gradients(batch, whole, losses, step)[1]
        base, always, *_ = self.gradients(batch, none, Losses(), step)
        alone: dict[str, tuple[Moment, Losses]] = {"reconstruction": (none, Losses())}
        if "sparsity" in terms:
            alone["sparsity"] = (replace(none, sparsity=whole.sparsity), Losses())
        if "aux" in terms and "aux" not in always:  # where it always is, it is a second reconstruction
            alone["aux"] = (replace(none, dead=whole.dead), Losses())
        for name in ("decorrelation", "max_cosine", "probe", "temporal"):
            if name in terms:
                alone[name] = (none, losses.only(name))
        norms = {}
        for name, (moment, only) in alone.items():
            g = self.gradients(batch, moment, only, step)[0]
            parts = [g[n] - (0 if name == "reconstruction" else base[n]) for n in self.architecture.trained]
            norms[name] = torch.stack([part.norm() for part in parts]).norm().item()
        total = sum(norms.values()) or 1.0
        return {name: norm / total for name, norm in norms.items()}

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
        dtype = product_dtype(recipe.precision, self.device)
        self._members = {m.sae_id: _Trained(m, scale, self.device, dtype) for m in members}

    @property
    def alive(self) -> list[Member]:
        """Members still in training, in order."""
        return [t.member for t in self._members.values()]

    @property
    def tokens(self) -> int:
        """Token rows each member has trained on."""
        return self.step * self.recipe.batch_size

    @torch.no_grad()
    def train(self, batches: Iterable[Tensor | Batch]) -> None:
        """One step per batch. A member whose loss is no longer finite stands still from there on."""
        for given in batches:
            batch = self._scaled(given)
            for member in self._members.values():
                if member.finite:
                    member.step(batch, self.recipe, self.step)
            self.step += 1

    def _scaled(self, given: Tensor | Batch) -> Batch:
        """On this device, x in float32 at variance 1."""
        given = given if isinstance(given, Batch) else Batch(given)
        x = given.x.to(self.device, torch.float32, non_blocking=True) * self.scale.factor
        labels, follows = (None if t is None else t.to(self.device, non_blocking=True) for t in given[1:])
        return Batch(x, labels, follows)

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

    @torch.no_grad()
    def gradient_shares(self, sae_id: str, batch: Tensor | Batch) -> dict[str, float]:
        """By loss term, its share of the gradient's norm on a batch, as if it came next. Empty after divergence."""
        t = self._members[sae_id]
        return t.gradient_shares(self._scaled(batch), self.recipe, self.step) if t.finite else {}

    def sae(self, sae_id: str) -> SAE:
        """The member as it stands, folded to read raw activations."""
        t = self._members[sae_id]
        own = {name: tensor for name, tensor in t.parameters.items() if name not in HEAD}
        return SAE(t.member.config, fold(own, self.scale.factor))

    def save(self, directory: Path) -> None:
        """Write the training state: a tensor file per member and `pack.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        for i, t in enumerate(self._members.values()):
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in t.tensors().items()}, directory / f"{i}.safetensors"
            )
        members = [asdict(t.member) | {"loss": t.loss, "finite": t.finite} for t in self._members.values()]
        facts = {"step": self.step, "recipe": asdict(self.recipe), "members": members}
        (directory / "pack.json").write_text(json.dumps(plain(facts), allow_nan=False))

    def load(self, directory: Path) -> None:
        """Take up the state that `save` wrote; members that were dropped by then are dropped, others in it left there."""
        facts = json.loads((directory / "pack.json").read_text())
        saved = {m["sae_id"]: m for m in facts["members"]}
        self.drop([sae_id for sae_id in list(self._members) if sae_id not in saved])
        for i, (sae_id, member) in enumerate(saved.items()):
            trained = self._members.get(sae_id)
            if trained is None:
                continue
            trained.load(load_tensors(directory / f"{i}.safetensors"))
            trained.finite = member["finite"]
            trained.loss = math.nan if member["loss"] is None else member["loss"]
        self.step = facts["step"]
