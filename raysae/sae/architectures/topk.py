"""The TopK family: k latents per row, chosen within the row or over the batch, with AuxK against dead ones."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from raysae.sae import latents
from raysae.sae.architectures.base import (
    Architecture,
    Moment,
    Parameters,
    SAEConfig,
    Step,
    add_gradients_at,
    affine_gradients,
    preactivations,
    product,
    reconstruct,
)
from raysae.sae.latents import Dense, Latents, Sparse, largest_of_all, largest_per_row


class Reconstruction(NamedTuple):
    """The reconstruction term and its gradients."""

    loss: Tensor  # []
    error: Tensor  # x̂ - x [rows, d_in]
    g_out: Tensor  # at whatever b_dec is added to [rows, d_in]
    g_W_dec: Tensor
    g_pre: Latents  # at the pre-activations


class TopK(Architecture):
    """The k largest positive pre-activations, unit-norm decoder, AuxK against dead latents (Gao et al. 2024, §2.3, A.2).

    loss = mean_n [ ‖x_n - x̂_n‖² + (1/32) ‖e_n - ê_n‖² · (E‖x - x̄‖² / E‖e - ē‖²) ], with e = x - x̂ detached and ê
    decoded, without bias, from the k_aux = d_in/2 largest pre-activations among dead latents. The published aux term is
    the share of the error's variance that ê misses; the factor puts it in units of x's variance.
    """

    name, coefficient, constrain_decoder = "topk", "k", True
    saelens = "topk"
    revives, aux_coefficient = True, 1 / 32

    @classmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        return cls.select(preactivations(p, x), config.k or 0).dense()

    @classmethod
    def encode_latents(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Latents:
        chosen = cls.select(preactivations(p, x), config.k or 0)
        return chosen if latents.sparse_pays((config.k or 0) / config.d_sae, x.device) else Dense(chosen.dense())

    @classmethod
    def select(cls, pre: Tensor, k: int) -> Sparse:
        """Training's latents from pre-activations [rows, d_sae]."""
        column = largest_per_row(pre, k)
        return _of_rows(pre.gather(1, column).relu_(), column, pre.shape[1])

    @classmethod
    def updated_buffers(cls, p: Parameters, chosen: Sparse) -> Parameters:
        """The buffers after a batch."""
        return {}

    @classmethod
    def to_saelens(cls, p: Parameters, config: SAEConfig) -> tuple[Parameters, dict[str, object]]:
        return {name: p[name] for name in cls.trained}, {"k": config.k, "rescale_acts_by_decoder_norm": False}

    @classmethod
    def step(cls, p: Parameters, config: SAEConfig, x: Tensor, moment: Moment) -> Step:
        k, centred = config.k or 0, x - p["b_dec"]
        pre = product(moment.dtype, p["b_enc"], centred, p["W_enc"])  # [rows, d_sae]
        chosen = cls.select(pre, k)
        dense = moment.latent_terms is not None or not latents.sparse_pays(k / config.d_sae, x.device)
        f: Latents = Dense(chosen.dense().to(moment.dtype or x.dtype)) if dense else chosen
        made = cls.reconstruct(p, x, f, moment)
        gradients = affine_gradients(p, centred, made.g_out, made.g_W_dec, made.g_pre)
        terms = {"reconstruction": made.loss}
        dead = moment.dead_index
        if len(dead):
            terms["aux"] = cls._add_aux_gradients(p, pre, made.error, x, dead, centred, gradients)
        return Step(gradients, terms, chosen.fired(), cls.updated_buffers(p, chosen))

    @classmethod
    def reconstruct(cls, p: Parameters, x: Tensor, f: Latents, moment: Moment) -> Reconstruction:
        """Decode, and the gradients back to the pre-activations."""
        loss, error, g_out = reconstruct(p, f, x)
        return Reconstruction(loss, error, g_out, f.rows(g_out), moment.gradient(f, g_out, p["W_dec"]).where_on(f))

    @classmethod
    def _add_aux_gradients(
        cls, p: Parameters, pre: Tensor, error: Tensor, x: Tensor, index: Tensor, centred: Tensor, gradients: Parameters
    ) -> Tensor:
        """Adds the gradients of the aux term over the latents `index` [n], and returns it."""
        k_aux = min(max(x.shape[1] // 2, 1), index.numel())
        f_aux = Dense(cls.select_aux(pre[:, index], k_aux).dense())  # [rows, n_dead]
        W_dec = p["W_dec"][index]
        miss = f_aux.decode(W_dec, error)  # ê - e, since e = -error
        scale = (x - x.mean(0)).square().sum() / (error - error.mean(0)).square().sum().clamp_min(1e-12)
        g_miss = miss * (2 * cls.aux_coefficient / x.shape[0] * scale)
        g_pre = f_aux.gradient(g_miss, W_dec).where_on(f_aux)
        gradients["W_dec"].index_add_(0, index, f_aux.rows(g_miss))
        add_gradients_at(index, gradients, p, centred, g_pre)
        return cls.aux_coefficient * scale * miss.square().sum() / x.shape[0]

    @classmethod
    def select_aux(cls, pre: Tensor, k: int) -> Sparse:
        """The latents of the aux term, always chosen within a row."""
        return TopK.select(pre, k)


class AbsTopK(TopK):
    """The k pre-activations of largest magnitude, sign kept: a latent may be negative (Zhu et al. 2025; AuxK as TopK).

    The decoder's norms are free, unlike TopK's: FVU at k 16 is 0.068 so, 0.071 at unit norm (stories260K, 500k tokens).
    """

    name, saelens, constrain_decoder = "abstopk", "abstopk", False

    @classmethod
    def select(cls, pre: Tensor, k: int) -> Sparse:
        column = largest_per_row(pre.abs(), k)
        return _of_rows(pre.gather(1, column), column, pre.shape[1])

    @classmethod
    def select_aux(cls, pre: Tensor, k: int) -> Sparse:
        return cls.select(pre, k)


class BatchTopK(TopK):
    """The k·rows largest positive pre-activations of the whole batch (Bussmann, Leask & Nanda 2024), AuxK as TopK.

    A row may use more latents than another. For inference, where there is no batch, a latent is on above a threshold: the
    running mean over batches (decay 0.99) of the smallest activation kept. Measured L0 therefore differs from k. SAELens
    knows this form as jumprelu.
    """

    name, saelens = "batchtopk", "jumprelu"
    decay = 0.99
    encoder_norm = 0.15  # with 0.3 some 2 % of the latents never fire, against 0.5 % (stories260K, 500k tokens)
    # At 1, up to 5.7 % never fire, at 0.6 2.5 %, at 0.3 1.5 % and FVU is 2 % up.
    rates = MappingProxyType({"b_enc": 0.6})

    @classmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        pre = preactivations(p, x)
        return pre.relu().mul_(pre > p["threshold"])

    @classmethod
    def encode_latents(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Latents:
        return latents.entries(cls.encode(p, config, x))

    @classmethod
    def initial(cls, config: SAEConfig, p: Parameters) -> Parameters:
        return p | {"threshold": torch.tensor(-1.0)}  # negative: no batch seen yet

    @classmethod
    def select(cls, pre: Tensor, k: int) -> Sparse:
        index = largest_of_all(pre, k * pre.shape[0])
        values = pre.flatten()[index].relu_()
        return Sparse(values, index // pre.shape[1], index % pre.shape[1], (pre.shape[0], pre.shape[1]))

    @classmethod
    def updated_buffers(cls, p: Parameters, chosen: Sparse) -> Parameters:
        smallest = torch.where(chosen.values > 0, chosen.values, torch.inf).min().float()
        before = p["threshold"]
        mean = torch.where(before < 0, smallest, cls.decay * before + (1 - cls.decay) * smallest)
        return {"threshold": torch.where(smallest.isfinite(), mean, before)}

    @classmethod
    def to_saelens(cls, p: Parameters, config: SAEConfig) -> tuple[Parameters, dict[str, object]]:
        tensors = {name: p[name] for name in cls.trained}
        return tensors | {"threshold": p["threshold"].expand(config.d_sae)}, {}

    @classmethod
    def from_saelens(cls, tensors: Parameters) -> Parameters:
        return tensors | {"threshold": tensors["threshold"][0]}


class Matryoshka(BatchTopK):
    """BatchTopK whose first latents must reconstruct alone (Bussmann et al. 2025): nested prefixes of the dictionary.

    loss = mean_n mean_g ‖x_n - x̂_ng‖² + AuxK, with x̂_g decoded from the first 1/32, 1/16 + 1/32, ..., and all latents:
    groups of 1/32, 1/16, 1/8, 1/4 and the rest, equally weighted, decoded one after another: all prefixes cost one decode.
    """

    name = "matryoshka"
    fractions = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
    rates = MappingProxyType({"b_enc": 0.3})  # at 1, 10 % never fire, at 0.3 up to 4.6 %, and FVU is the same

    @classmethod
    def ends(cls, d_sae: int) -> list[int]:
        """Where each group ends."""
        ends, total = [], 0.0
        for fraction in cls.fractions:
            total += fraction
            ends.append(max(1, round(total * d_sae)))
        return sorted({*ends, d_sae})

    @classmethod
    def reconstruct(cls, p: Parameters, x: Tensor, f: Latents, moment: Moment) -> Reconstruction:
        values = f.dense().to(moment.dtype or x.dtype)
        ends = cls.ends(values.shape[1])
        groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        errors, error = [], p["b_dec"] - x
        for group in groups:
            error = Dense(values[:, group]).decode(p["W_dec"][group], error)
            errors.append(error)
        g_out = torch.zeros_like(x)
        g_W_dec = torch.empty_like(p["W_dec"])
        g_pre = torch.empty_like(values)
        for group, prefix_error in zip(reversed(groups), reversed(errors), strict=True):
            g_out = g_out + prefix_error * (2 / (x.shape[0] * len(groups)))  # of all prefixes that hold this group
            g_W_dec[group] = Dense(values[:, group]).rows(g_out)
            g_pre[:, group] = Dense(values[:, group]).gradient(g_out, p["W_dec"][group]).values
        if moment.latent_terms is not None:
            g_pre += moment.latent_terms(values)
        loss = torch.stack([e.square().sum() for e in errors]).mean() / x.shape[0]
        return Reconstruction(loss, errors[-1], g_out, g_W_dec, Dense(g_pre).where_on(Dense(values)))


def _of_rows(values: Tensor, column: Tensor, d_sae: int) -> Sparse:
    """Latents from values and columns [rows, k]."""
    rows, k = values.shape
    row = torch.arange(rows, device=values.device).repeat_interleave(k)
    return Sparse(values.flatten(), row, column.flatten(), (rows, d_sae))
