"""Our trainer and those of SAELens, dictionary_learning and sparsify behind one interface: train, then reconstruct.

Each library is driven through its own trainer, as its own loop drives it, on activations in memory. What that loop does
besides (language model, W&B, checkpoints) is left out, in its favour. `Spec.sparsity` and `learning_rate` are in the
library's own units: an L1 coefficient for inputs of mean ‖x‖² = 1 (ours, dictionary_learning) or d_in (SAELens).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import statistics
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, ClassVar

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from torch import Tensor

from raysae.sae.architectures import ARCHITECTURES, SAEConfig
from raysae.sae.architectures.topk import Matryoshka
from raysae.sae.train import InputScale, Member, Pack, Recipe

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(x̂ [rows, d_in], latents [rows, d_sae]) of raw rows, by the library's rule of inference."""

OFF = -10.0
"""Encoder bias of a latent that shall not fire on rows of norm near 1."""


@dataclass(frozen=True)
class Spec:
    """An SAE to train."""

    architecture: str
    d_in: int
    d_sae: int
    sparsity: float
    learning_rate: float
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the library's own config."""


class Trainer(ABC):
    """SAEs in training on one stream. `scale` None: the rows come scaled, and the library shall not scale them again."""

    library: ClassVar[str]
    module: ClassVar[str]
    """What must import for it."""
    names: ClassVar[Mapping[str, str]]
    """Its name of each of our architectures that it has."""
    one_precision: ClassVar[bool] = False
    """Whether it knows no choice of precision."""

    @abstractmethod
    def __init__(self, specs: Sequence[Spec], recipe: Recipe, scale: InputScale | None, device: str) -> None: ...

    @abstractmethod
    def train(self, batches: Iterable[Tensor], steps: int) -> None:
        """Optimizer steps on the first `steps` batches [batch, d_in] of raw rows, in float32 and on the device."""

    @abstractmethod
    def encoders(self) -> list[tuple[Tensor, Tensor]]:
        """Each SAE's (encoder [d_in, d_sae], bias [d_sae]), which may be written to."""

    @abstractmethod
    def count_dead(self, index: Tensor) -> None:
        """Count these latents as dead."""

    def kill(self, index: Tensor) -> None:
        """Switch these latents off and count them as dead."""
        for _, bias in self.encoders():
            bias[index] = OFF
        self.count_dead(index)

    def thin(self, share: float) -> None:
        """Let this share of the latents fire on rows drawn from a normal distribution with mean ‖x‖² = 1."""
        quantile = statistics.NormalDist().inv_cdf(share)
        for encoder, bias in self.encoders():
            bias.copy_(quantile * encoder.norm(dim=0) / math.sqrt(len(encoder)))

    @abstractmethod
    def inference(self) -> Reconstruct:
        """The first SAE as a user would have it after training, which is over."""


class Ours(Trainer):
    """A `Pack` of all SAEs."""

    library, module, names = "raysae", "raysae", {name: name for name in ARCHITECTURES}

    def __init__(self, specs: Sequence[Spec], recipe: Recipe, scale: InputScale | None, device: str) -> None:
        members = []
        for i, s in enumerate(specs):
            coefficient = ARCHITECTURES[s.architecture].coefficient
            value = round(s.sparsity) if coefficient == "k" else s.sparsity
            fields: dict[str, Any] = {coefficient: value, "seed": s.seed, **s.options}
            members.append(Member(str(i), SAEConfig(s.architecture, s.d_in, s.d_sae, **fields), s.learning_rate))
        self.pack = Pack(members, recipe, scale or InputScale(torch.zeros(specs[0].d_in), 1.0), device)

    def train(self, batches: Iterable[Tensor], steps: int) -> None:
        self.pack.train(islice(batches, steps))

    def encoders(self) -> list[tuple[Tensor, Tensor]]:
        return [(m.parameters["W_enc"], m.parameters["b_enc"]) for m in self.pack._members.values()]

    def count_dead(self, index: Tensor) -> None:
        for member in self.pack._members.values():
            member.silent_tokens[index] = self.pack.recipe.dead_after_tokens

    def inference(self) -> Reconstruct:
        sae = self.pack.sae("0")

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            f = sae.encode(x)
            return sae.decode(f), f

        return reconstruct


class SAELens(Trainer):
    """`SAETrainer.fit` of one SAE, `MultiSAETrainer.fit` of several. Inference is of the SAE saved and loaded again.

    Inputs are scaled to E‖x‖² = d_in, as `expected_average_only_in` does (with E‖x‖, not its square). The option
    `compile_sae` is the runner's.
    """

    library, module = "SAELens", "sae_lens"
    names: ClassVar[Mapping[str, str]] = {
        "relu": "standard",
        "topk": "topk",
        "batchtopk": "batchtopk",
        "abstopk": "abstopk",
        "jumprelu": "jumprelu",
        "jumprelu_l0": "jumprelu",
        "jumprelu_tanh": "jumprelu",
        "gated": "gated",
        "matryoshka": "matryoshka_batchtopk",
    }
    jumprelu: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "jumprelu": {"jumprelu_sparsity_loss_mode": "quadratic"},
        "jumprelu_l0": {"jumprelu_sparsity_loss_mode": "step"},
        "jumprelu_tanh": {  # with what its documentation gives for this loss
            "jumprelu_sparsity_loss_mode": "tanh",
            "pre_act_loss_coefficient": 3e-6,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
        },
    }

    def __init__(self, specs: Sequence[Spec], recipe: Recipe, scale: InputScale | None, device: str) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.multi_sae_trainer import MultiSAETrainer
        from sae_lens.training.sae_trainer import SAETrainer

        self.batch_size = recipe.batch_size
        cfg = SAETrainerConfig(
            total_training_samples=recipe.steps * recipe.batch_size,
            train_batch_size_samples=recipe.batch_size,
            lr=specs[0].learning_rate,
            lr_end=specs[0].learning_rate / 10,  # the runner's default; unused by a constant schedule
            lr_warm_up_steps=recipe.warmup_steps,
            lr_decay_steps=recipe.decay_steps,
            device=device,
            autocast=recipe.precision == "bfloat16",
            dead_feature_window=recipe.dead_after_tokens // recipe.batch_size,
        )
        saes = {str(i): self._sae(spec, recipe, scale, device) for i, spec in enumerate(specs)}
        self.batches: Iterator[Tensor] = iter(())
        if len(saes) == 1:
            self.trainer = SAETrainer(cfg, saes["0"], self._feed())
            self.trainers = [self.trainer]
        else:
            feed = ({"x": batch} for batch in self._feed())
            self.trainer = MultiSAETrainer(cfg, saes, dict.fromkeys(saes, "x"), feed)
            self.trainers = list(self.trainer.trainers.values())
        if scale is not None:
            for trainer in self.trainers:
                trainer.activation_scaler.scaling_factor = math.sqrt(specs[0].d_in) * scale.factor
        cfg.total_training_samples = 0  # what `fit` shall reach: raised by every `train`

    def _sae(self, spec: Spec, recipe: Recipe, scale: InputScale | None, device: str) -> Any:
        from sae_lens.registry import get_sae_training_class

        made, config = get_sae_training_class(self.names[spec.architecture])
        fields: dict[str, Any] = {
            "d_in": spec.d_in,
            "d_sae": spec.d_sae,
            "device": device,
            "normalize_activations": "none" if scale is None else "expected_average_only_in",
        }
        if spec.architecture in ("relu", "gated"):
            fields |= {"l1_coefficient": spec.sparsity, "l1_warm_up_steps": recipe.sparsity_warmup_steps}
        elif spec.architecture in self.jumprelu:
            goal = "target_l0" if spec.architecture == "jumprelu" else "l0_coefficient"
            fields |= {goal: spec.sparsity, "l0_warm_up_steps": recipe.sparsity_warmup_steps}
            fields |= self.jumprelu[spec.architecture]
        else:
            fields["k"] = round(spec.sparsity)
        if spec.architecture == "matryoshka":
            fields["matryoshka_widths"] = Matryoshka.ends(spec.d_sae)
        fields |= spec.options
        compiled = fields.pop("compile_sae", False)
        torch.manual_seed(spec.seed)
        sae = made(config(**fields)).to(device)
        if compiled:
            sae.training_forward_pass = torch.compile(sae.training_forward_pass)
        return sae

    def _feed(self) -> Iterator[Tensor]:
        while True:
            yield next(self.batches)

    def train(self, batches: Iterable[Tensor], steps: int) -> None:
        self.batches = iter(batches)
        self.trainer.cfg.total_training_samples += steps * self.batch_size
        self.trainer.fit()

    def encoders(self) -> list[tuple[Tensor, Tensor]]:
        return [(trainer.sae.W_enc.data, trainer.sae.b_enc.data) for trainer in self.trainers]

    def count_dead(self, index: Tensor) -> None:
        for trainer in self.trainers:
            trainer.n_forward_passes_since_fired[index] = trainer.cfg.dead_feature_window + 1

    def inference(self) -> Reconstruct:
        from sae_lens import SAE

        with tempfile.TemporaryDirectory() as directory:
            self.trainers[0].sae.save_inference_model(directory)
            sae = SAE.load_from_disk(directory)

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            f = sae.encode(x)
            return sae.decode(f), f

        return reconstruct


class DictionaryLearning(Trainer):
    """Its trainers, one after another on each batch, as `trainSAE` does, which scales inputs to mean ‖x‖² = 1.

    `trainSAE` autocasts on CUDA alone; here on a CPU too, if asked to. Set by hand: when latents count as dead (fixed at
    10M tokens), and from when and how fast BatchTopK's threshold is tracked (from step 1000, decay 0.999), which a short
    run would not live to see. Options for p-annealing and Matryoshka are those of its demo.
    """

    library, module = "dictionary_learning", "dictionary_learning"
    names: ClassVar[Mapping[str, str]] = {
        "relu": "standard.StandardTrainerAprilUpdate",
        "relu_unit_norm": "standard.StandardTrainer",
        "topk": "top_k.TopKTrainer",
        "batchtopk": "batch_top_k.BatchTopKTrainer",
        "jumprelu": "jumprelu.JumpReluTrainer",
        "gated": "gdm.GatedSAETrainer",
        "p_anneal": "p_anneal.PAnnealTrainer",
        "matryoshka": "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
    }

    def __init__(self, specs: Sequence[Spec], recipe: Recipe, scale: InputScale | None, device: str) -> None:
        self.step, self.factor, self.device = 0, 1.0 if scale is None else scale.factor, device
        self.dtype = getattr(torch, recipe.precision)
        self.trainers = [self._trainer(spec, recipe, device) for spec in specs]

    def _trainer(self, spec: Spec, recipe: Recipe, device: str) -> Any:
        module, name = self.names[spec.architecture].split(".")
        made = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)
        fields: dict[str, Any] = {
            "steps": recipe.steps,
            "activation_dim": spec.d_in,
            "dict_size": spec.d_sae,
            "lr": spec.learning_rate,
            "warmup_steps": recipe.warmup_steps,
            "decay_start": recipe.steps - recipe.decay_steps if recipe.decay_steps else None,
            "device": device,
            "layer": 0,
            "lm_name": "none",
            "seed": spec.seed,
        }
        if spec.architecture in ("topk", "batchtopk", "matryoshka"):
            fields |= {"k": round(spec.sparsity), "threshold_start_step": recipe.steps // 2, "threshold_beta": 0.99}
        else:
            goal = {"jumprelu": "target_l0", "p_anneal": "initial_sparsity_penalty"}.get(
                spec.architecture, "l1_penalty"
            )
            fields |= {goal: spec.sparsity, "sparsity_warmup_steps": recipe.sparsity_warmup_steps}
        if spec.architecture == "p_anneal":
            fields |= {"sparsity_function": "Lp^p", "p_end": 0.2, "anneal_start": max(1, recipe.steps // 24)}
        if spec.architecture == "matryoshka":
            ends = [0, *Matryoshka.ends(spec.d_sae)]
            fields["group_fractions"] = [(b - a) / spec.d_sae for a, b in pairwise(ends)]
        torch.manual_seed(spec.seed)
        trainer = made(**(fields | dict(spec.options)))
        trainer.dead_feature_threshold = recipe.dead_after_tokens
        return trainer

    def train(self, batches: Iterable[Tensor], steps: int) -> None:
        low = self.dtype != torch.float32
        autocast = torch.autocast(torch.device(self.device).type, self.dtype) if low else contextlib.nullcontext()
        for x in islice(batches, steps):
            scaled = x.to(self.dtype) * self.factor if self.factor != 1.0 else x.to(self.dtype)
            for trainer in self.trainers:
                with autocast:
                    trainer.update(self.step, scaled)
            self.step += 1

    def encoders(self) -> list[tuple[Tensor, Tensor]]:
        encoders = [trainer.ae.encoder for trainer in self.trainers]
        return [(encoder.weight.data.T, encoder.bias.data) for encoder in encoders]

    def count_dead(self, index: Tensor) -> None:
        for trainer in self.trainers:
            trainer.num_tokens_since_fired[index] = trainer.dead_feature_threshold

    def inference(self) -> Reconstruct:
        ae = self.trainers[0].ae
        ae.scale_biases(1 / self.factor)

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            f = ae.encode(x)
            return ae.decode(f), f

        return reconstruct


class Sparsify(Trainer):
    """`SparseCoder` with the lines of `Trainer.fit` around it (loss fvu, optimizer signum), which runs on a model alone.

    It knows no scaling of inputs. AuxK is off by default; with `kill` it is on, with the paper's 1/32. Its forward pass
    autocasts to bfloat16 on CUDA and nowhere else.
    """

    library, module, names, one_precision = "sparsify", "sparsify", {"topk": "topk"}, True

    def __init__(self, specs: Sequence[Spec], recipe: Recipe, scale: InputScale | None, device: str) -> None:
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD

        self.dead_after_tokens, self.auxk_alpha, self.started = recipe.dead_after_tokens, 1 / 32, False
        self.saes = []
        for spec in specs:
            torch.manual_seed(spec.seed)
            config = SparseCoderConfig(num_latents=spec.d_sae, k=round(spec.sparsity))
            self.saes.append(SparseCoder(spec.d_in, config, device, dtype=torch.float32))
        groups = [{"params": sae.parameters(), "lr": s.learning_rate} for sae, s in zip(self.saes, specs, strict=True)]
        self.optimizer = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
        self.optimizer.train()
        self.silent = [torch.zeros(s.d_sae, device=device, dtype=torch.long) for s in specs]

    def train(self, batches: Iterable[Tensor], steps: int) -> None:
        for x in islice(batches, steps):
            if not self.started:
                for sae in self.saes:
                    sae.b_dec.data = x.mean(0)
                self.started = True
            fired = []
            for sae, silent in zip(self.saes, self.silent, strict=True):
                sae.set_decoder_norm_to_unit_norm()
                variance = (x - x.mean(0)).pow(2).sum()
                out = sae(x, dead_mask=silent > self.dead_after_tokens, total_variance=variance)
                (out.fvu + self.auxk_alpha * out.auxk_loss).backward()
                fired.append(out.latent_indices.flatten())
            for sae in self.saes:
                sae.remove_gradient_parallel_to_decoder_directions()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for silent, index in zip(self.silent, fired, strict=True):
                silent += x.shape[0]
                silent[index] = 0

    def encoders(self) -> list[tuple[Tensor, Tensor]]:
        return [(sae.encoder.weight.data.T, sae.encoder.bias.data) for sae in self.saes]

    def count_dead(self, index: Tensor) -> None:
        for silent in self.silent:
            silent[index] = self.dead_after_tokens + 1

    def inference(self) -> Reconstruct:
        self.optimizer.eval()
        sae = self.saes[0]
        sae.set_decoder_norm_to_unit_norm()

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            values, index, pre = sae.encode(x)
            return sae.decode(values, index), torch.zeros_like(pre).scatter_(1, index, values)

        return reconstruct


LIBRARIES: dict[str, type[Trainer]] = {made.library: made for made in (Ours, SAELens, DictionaryLearning, Sparsify)}


def importable(wanted: Sequence[str] = tuple(LIBRARIES)) -> tuple[dict[str, type[Trainer]], dict[str, str]]:
    """Which of these libraries are here, and why each of the others is not."""
    here, absent = {}, {}
    for name in wanted:
        made = LIBRARIES[name]
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(made.module)
            here[name] = made
        except Exception as error:
            absent[name] = f"not importable ({type(error).__name__}: {error})".splitlines()[0]
    return here, absent
