"""A batch's latents, or the gradient at them, as a [rows, d_sae] matrix kept dense or sparse: one interface.

A training step needs four products of such a matrix: with W_dec (decode), with the batch from either side (gradients of
W_dec and W_enc), and the gradient at its own non-zero entries. With a share s of the entries on, the sparse forms cost s
of the FLOPs; each is a gather of rows that `embedding_bag` sums without a [entries, d_in] tensor in between. Both forms
give the same sums, in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

SPARSE_BELOW = 1 / 16
"""Share of entries below which a matrix is kept sparse: where the two forms' times meet (benchmarks/train_step.py)."""


@dataclass(frozen=True)
class Dense:
    """`values` [rows, d_sae]."""

    values: Tensor

    def with_values(self, values: Tensor) -> Dense:
        """The same places with other values."""
        return Dense(values)

    def at(self, matrix: Tensor) -> Tensor:
        """A [rows, d_sae] matrix at these places, shaped as `values`."""
        return matrix

    def of_column(self, vector: Tensor) -> Tensor:
        """A [d_sae] vector at each place's column, broadcastable to `values`."""
        return vector

    def dense(self) -> Tensor:
        """As a tensor [rows, d_sae]."""
        return self.values

    def decode(self, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """f W_dec + b_dec [rows, d_in]."""
        low = self.values.dtype
        return torch.addmm(b_dec.to(low), self.values, W_dec.to(low)).to(b_dec.dtype)

    def rows(self, y: Tensor) -> Tensor:
        """fᵀ y [d_sae, d_in] for y [rows, d_in]."""
        return (self.values.T @ y.to(self.values.dtype)).to(y.dtype)

    def columns(self, y: Tensor) -> Tensor:
        """yᵀ f [d_in, d_sae] for y [rows, d_in]."""
        return (y.to(self.values.dtype).T @ self.values).to(y.dtype)

    def gradient(self, g_out: Tensor, W_dec: Tensor, bias: Tensor | None = None) -> Dense:
        """g_out W_decᵀ + bias [d_sae] at these places."""
        low = self.values.dtype
        if bias is None:
            return Dense(g_out.to(low) @ W_dec.to(low).T)
        return Dense(torch.addmm(bias.to(low), g_out.to(low), W_dec.to(low).T))

    def where_on(self, f: Latents) -> Dense:
        """These values where f is not zero, in place."""
        return Dense(self.values.mul_(f.values != 0))

    def where_positive(self, f: Latents) -> Dense:
        """These values where f is positive, in place, in one pass."""
        return Dense(torch.ops.aten.threshold_backward.grad_input(self.values, f.values, 0, grad_input=self.values))

    def sum(self) -> Tensor:
        """Sum over rows [d_sae]."""
        return self.values.sum(0, dtype=torch.promote_types(self.values.dtype, torch.float32))

    def fired(self) -> Tensor:
        """[d_sae] bool: non-zero in any row."""
        return (self.values != 0).view(torch.uint8).amax(0).bool()  # at less than half of any()'s time on a CPU

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries that are not zero of each row, their Σ|f| [rows], and those of each column [d_sae]."""
        # Sums of bytes into int32 are many times faster than of bool into int64.
        on = (self.values != 0).view(torch.uint8)
        return on.sum(1, dtype=torch.int32), self.values.abs().sum(1), on.sum(0, dtype=torch.int32)


@dataclass(frozen=True)
class Sparse:
    """Entries `values` [n] at (`row`, `column`) [n], ordered by row; `shape` (rows, d_sae). Methods as Dense's."""

    values: Tensor
    row: Tensor
    column: Tensor
    shape: tuple[int, int]

    @cached_property
    def _row_starts(self) -> Tensor:
        return _starts(self.row, self.shape[0])

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order of the entries by column, their rows in that order, and where each column starts."""
        order = self.column.to(torch.int32).argsort(stable=True)
        return order, self.row[order], _starts(self.column, self.shape[1])

    def with_values(self, values: Tensor) -> Sparse:
        other = Sparse(values, self.row, self.column, self.shape)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k.startswith("_")})  # the same places
        return other

    def at(self, matrix: Tensor) -> Tensor:
        return matrix[self.row, self.column]

    def of_column(self, vector: Tensor) -> Tensor:
        return vector[self.column]

    def dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).index_put_((self.row, self.column), self.values)

    def decode(self, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        weights = self.values.to(W_dec.dtype)
        return embedding_bag(self.column, W_dec, self._row_starts, mode="sum", per_sample_weights=weights).add_(b_dec)

    def rows(self, y: Tensor) -> Tensor:
        order, row, starts = self._by_column
        return embedding_bag(row, y, starts, mode="sum", per_sample_weights=self.values[order].to(y.dtype))

    def columns(self, y: Tensor) -> Tensor:
        return self.rows(y).T.contiguous()

    def gradient(self, g_out: Tensor, W_dec: Tensor, bias: Tensor | None = None) -> Sparse:
        g = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            g_out, W_dec, self.column, self._row_starts, self.row, 0
        )
        return self.with_values(g if bias is None else g.add_(bias[self.column]))

    def where_on(self, f: Latents) -> Sparse:
        return self.with_values(self.values.mul_(f.values != 0))

    def where_positive(self, f: Latents) -> Sparse:
        return self.with_values(self.values.mul_(f.values > 0))

    def sum(self) -> Tensor:
        values = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
        return torch.zeros(self.shape[1], dtype=values.dtype, device=values.device).index_add_(0, self.column, values)

    def fired(self) -> Tensor:
        fired = torch.zeros(self.shape[1], dtype=torch.bool, device=self.values.device)
        return fired.index_fill_(0, self.column[self.values != 0], True)

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        on, (rows, columns) = self.values != 0, self.shape
        l1 = self.values.new_zeros(rows).index_add_(0, self.row, self.values.abs())
        return torch.bincount(self.row[on], minlength=rows), l1, torch.bincount(self.column[on], minlength=columns)


Latents = Dense | Sparse


def sparse_pays(share: float, device: torch.device) -> bool:
    """Whether a matrix with this share of its entries on is better kept sparse. On a CPU only: on a GPU counting them would
    wait for the device, and a gather gains less over its matrix units (not measured)."""
    return device.type == "cpu" and share < SPARSE_BELOW


def entries(f: Tensor, on: Tensor | None = None) -> Latents:
    """f [rows, d_sae] with the places where `on` (f ≠ 0, if None): sparse where that pays."""
    if not sparse_pays(0.0, f.device):
        return Dense(f)
    # A sixteenth of the rows: to count all costs as much as a product at d 64.
    some = (f if on is None else on)[::16] != 0
    if not sparse_pays(int(torch.count_nonzero(some)) / some.numel(), f.device):
        return Dense(f)
    on = f != 0 if on is None else on
    index = torch.from_numpy(np.flatnonzero(on.numpy()))  # torch's own takes up to ten times as long on one thread
    row = index.div(f.shape[1], rounding_mode="floor")
    values = f.flatten()[index]
    values = values.float() if values.dtype == torch.bfloat16 else values  # embedding_bag's weights match its rows
    return Sparse(values, row, index - row * f.shape[1], (f.shape[0], f.shape[1]))


def _starts(sorted_index: Tensor, size: int) -> Tensor:
    counts = torch.bincount(sorted_index, minlength=size)
    return counts.cumsum(0) - counts


def largest_per_row(score: Tensor, k: int) -> Tensor:
    """Column indices [rows, k] of the k largest entries of each row, in no order.

    Exact, and faster than one `topk` on a CPU: the k largest entries lie in the k groups with the largest maxima, so only
    those groups' entries are sorted.
    """
    rows, n = score.shape
    group = _group(n, k)
    if group == 1:
        return score.topk(k, dim=1, sorted=False).indices
    groups = n // group  # of `group` entries each, that many columns apart: their maxima are taken column by column
    best = score.view(rows, group, groups).amax(1).topk(k, dim=1, sorted=False).indices  # [rows, k]
    columns = (best.unsqueeze(1) + groups * torch.arange(group, device=score.device).unsqueeze(1)).view(rows, -1)
    return columns.gather(1, score.gather(1, columns).topk(k, dim=1, sorted=False).indices)


def largest_of_all(score: Tensor, count: int) -> Tensor:
    """Flat indices, ascending, of the `count` largest entries of a matrix (and of ties with the last of them)."""
    flat = score.flatten()
    group = _group(flat.numel(), count)
    if group == 1:
        return (flat >= flat.topk(count, sorted=False).values.min()).nonzero().squeeze(1)
    maxima, best = flat.view(group, -1).amax(0).topk(count, sorted=False)
    index = (best + flat.numel() // group * torch.arange(group, device=score.device).unsqueeze(1)).flatten()
    values = flat[index]
    able = (
        values >= maxima.min()
    )  # `count` entries reach the least of the maxima, and no other group holds one that does
    index, values = index[able], values[able]
    return index[values >= values.topk(count, sorted=False).values.min()].sort().values


def _group(n: int, k: int) -> int:
    """The divisor of n, a power of two, that leaves least to sort: n / g group maxima, then k g entries."""
    divisors = [g for g in (1, 2, 4, 8, 16, 32) if n % g == 0 and n // g >= k]
    return min(divisors, key=lambda g: n if g == 1 else n / g + k * g + n / 8, default=1)
