"""Every architecture's training loss as plain autograd, from the papers: what the hand-derived steps are compared with."""

import math

import torch

REVIVING = ("topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "jumprelu_l0")
"""Those whose loss has a term for dead latents."""


class Jump(torch.autograd.Function):
    """pre·1[pre > θ], with the straight-through estimator of Rajamanoharan et al. 2024, eq. 11."""

    @staticmethod
    def forward(ctx, pre, theta, epsilon):
        ctx.save_for_backward(pre, theta)
        ctx.epsilon = epsilon
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, g):
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.epsilon / 2).to(pre)
        return g * (pre > theta), (-(theta / ctx.epsilon) * near * g).sum(0), None


class Count(torch.autograd.Function):
    """1[pre > θ], with eq. 12."""

    @staticmethod
    def forward(ctx, pre, theta, epsilon):
        ctx.save_for_backward(pre, theta)
        ctx.epsilon = epsilon
        return (pre > theta).to(pre)

    @staticmethod
    def backward(ctx, g):
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.epsilon / 2).to(pre)
        return torch.zeros_like(pre), (-(1 / ctx.epsilon) * near * g).sum(0), None


def loss_and_latents(config, p, x, sparsity=1.0, progress=0.0, dead=None, bandwidth=None):
    """(loss, f [rows, d_sae]) of parameters that autograd tracks. `sparsity`: share of the coefficient in force."""
    name, rows, d = config.architecture, x.shape[0], x.shape[1]
    weight = sparsity * config.sparsity
    norms = p["W_dec"].norm(dim=1)
    centred = x - p["b_dec"]
    square = lambda e: e.square().sum(1).mean()  # noqa: E731

    if name == "gated":
        xw = centred @ p["W_enc"]
        pi = xw + p["b_gate"]
        f = (pi > 0) * (xw * p["r_mag"].exp() + p["b_mag"]).relu()
        frozen = pi.relu() @ p["W_dec"].detach() + p["b_dec"].detach()
        loss = square(x - f @ p["W_dec"] - p["b_dec"]) + weight * pi.relu().sum(1).mean() + square(x - frozen)
        return loss, f

    pre = centred @ p["W_enc"] + p["b_enc"]
    if name in ("relu", "relu_unit_norm"):
        f = pre.relu()
        return square(x - f @ p["W_dec"] - p["b_dec"]) + weight * (f * norms).sum(1).mean(), f
    if name == "p_anneal":
        f = pre.relu()
        power = 1 - 0.8 * min(1.0, int(max(0.0, (progress - 0.5) / 0.5) * 10) / 10)
        raised = torch.where(f > 1e-3, f.clamp_min(1e-3).pow(power), f * 1e-3 ** (power - 1))
        return square(x - f @ p["W_dec"] - p["b_dec"]) + weight * p["scale"] * raised.sum(1).mean(), f
    if name.startswith("jumprelu"):
        theta = p["log_threshold"].exp()
        f = Jump.apply(pre, theta, bandwidth)
        loss = square(x - f @ p["W_dec"] - p["b_dec"])
        if name == "jumprelu_tanh":
            squashed = torch.tanh(4 * math.sqrt(d) * f * norms).sum(1).mean()
            return loss + weight * squashed + 3e-6 / math.sqrt(d) * ((theta - pre).relu() * norms).sum(1).mean(), f
        if dead is not None:
            loss = loss + 1e-3 * (theta - pre)[:, dead].relu().sum(1).mean()
        l0 = Count.apply(pre, theta, bandwidth).sum(1).mean()
        return loss + (weight * l0 if name == "jumprelu_l0" else sparsity * (l0 / config.target_l0 - 1) ** 2), f

    def keep(values, k):
        score = values.abs() if name == "abstopk" else values
        kept = torch.zeros_like(values).scatter(1, score.topk(k, dim=1).indices, 1.0)
        return (values if name == "abstopk" else values.relu()) * kept

    if name in ("batchtopk", "matryoshka"):
        f = pre.relu() * (pre >= pre.flatten().sort(descending=True).values[config.k * rows - 1])
    else:
        f = keep(pre, config.k)
    e = x - f @ p["W_dec"] - p["b_dec"]
    loss = square(e)
    if name == "matryoshka":
        ends, total = [], 0.0
        for fraction in (1 / 32, 1 / 16, 1 / 8, 1 / 4):
            total += fraction
            ends.append(max(1, round(total * config.d_sae)))
        ends = sorted({*ends, config.d_sae})
        loss = sum(square(x - f[:, :n] @ p["W_dec"][:n] - p["b_dec"]) for n in ends) / len(ends)
    if dead is not None and dead.any():
        e = e.detach()
        k_aux = min(d // 2, int(dead.sum()))
        e_hat = (TOPK_KEEP if name != "abstopk" else keep)(pre[:, dead], k_aux) @ p["W_dec"][dead]
        scale = (x - x.mean(0)).square().sum() / (e - e.mean(0)).square().sum()
        loss = loss + square(e - e_hat) * scale / 32
    return loss, f


def TOPK_KEEP(values, k):
    return values.relu() * torch.zeros_like(values).scatter(1, values.topk(k, dim=1).indices, 1.0)
