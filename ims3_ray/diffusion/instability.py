"""The instability coefficient of a generator (Eq. 12): how much its map from noise to data stretches space around a point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.func import jacrev, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.diffusion.samplers.ddim import ddim_step
from ims3_ray.diffusion.schedule import NoiseSchedule

Map = Callable[[Tensor], Tensor]
"""A function [B, …] → [B, …] that treats each sample independently of the others."""


def log_instability(
    predict: Predictor,
    noise: Tensor,
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    exact: bool,
    probes: int = 1,
    lanczos_steps: int = 8,
    generator: Generator | None = None,
) -> Tensor:
    """log Ē_F of Eq. 12 at each sample of ``noise`` [B, C, H, W]; returns float64 [B].

    F is the deterministic sampler (Eq. 1, ``num_steps`` steps, no clamping) from its first timestep down to the clean latent.
    The geometric mean of the singular values of its Jacobian is |det J_F|^(1/n), n = C·H·W, and by the chain rule the
    log-determinants of the steps add up. ``exact`` forms each step's Jacobian (n backward passes); otherwise
    :func:`log_volume` estimates it.
    """
    timesteps = schedule.respaced(num_steps).tolist()
    z, total = noise, torch.zeros(len(noise), dtype=torch.float64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        for i in range(num_steps - 1, -1, -1):
            following = schedule.alpha_bar[timesteps[i - 1]] if i > 0 else torch.ones((), dtype=torch.float64)

            def step(x: Tensor, t: int = timesteps[i], following: Tensor = following) -> Tensor:
                t_B = torch.full((len(x),), t, device=x.device)
                return ddim_step(x, predict(x, t_B), schedule.alpha_bar[t].to(x), following.to(x))

            if exact:
                total += exact_log_volume(step, z)
            else:
                total += log_volume(step, z, probes, lanczos_steps, generator)
            z = step(z)
    return total


def exact_log_volume(f: Map, z: Tensor) -> Tensor:
    """(1/n)·log|det J_f| at each sample of ``z``, float64 [B], from the whole Jacobian."""
    rows = []
    for b in range(len(z)):
        jacobian = jacrev(lambda x, b=b: f(torch.cat([z[:b], x[None], z[b + 1 :]]))[b].flatten(), chunk_size=64)(z[b])
        rows.append(torch.linalg.slogdet(jacobian.flatten(1).double()).logabsdet / z[b].numel())
    return torch.stack(rows).cpu()


def log_volume(f: Map, z: Tensor, probes: int, steps: int, generator: Generator | None = None) -> Tensor:
    """An estimate of (1/n)·log|det J_f| = (1/2n)·tr log(JᵀJ) at each sample of ``z``, float64 [B].

    Stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017): the mean over random directions v of the Gauss quadrature of
    vᵀ·log(JᵀJ)·v, whose nodes come from ``steps`` Lanczos steps. One product with JᵀJ costs a forward- and a reverse-mode
    derivative of ``f``; the samples of a batch are computed together. The logarithm's even derivatives are negative, so the
    quadrature overestimates, by less the more steps it takes: compare only values computed with the same settings.
    """
    back = vjp(f, z)[1]

    def gram(v: Tensor) -> Tensor:
        return back(jvp(f, (z,), (v.reshape(z.shape).to(z),))[1])[0].flatten(1).double()

    size = z[0].numel()
    found = []
    for _ in range(probes):
        signs = torch.randint(2, (len(z), size), generator=generator).to(z.device) * 2.0 - 1.0
        nodes, weights = _gauss_nodes(gram, signs.double() / size**0.5, min(steps, size))
        found.append((weights * nodes.clamp(min=1e-30).log()).sum(dim=1) / 2)
    return torch.stack(found).mean(dim=0).cpu()


def _gauss_nodes(product: Map, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, [B, steps] each, of the quadrature from ``steps`` Lanczos steps that begin at unit vectors [B, n]."""
    basis = [start]
    diagonal, beside = [], []
    for _ in range(steps):
        w = product(basis[-1])
        diagonal.append((w * basis[-1]).sum(dim=1))
        # Made orthogonal to all earlier vectors, twice: rounding would otherwise bring back eigenvalues already found.
        for _ in range(2):
            for q in basis:
                w = w - (w * q).sum(dim=1, keepdim=True) * q
        norm = w.norm(dim=1, keepdim=True)
        beside.append(norm[:, 0])
        basis.append(w / norm.clamp(min=1e-30))
    off = torch.stack(beside[:-1], dim=1) if steps > 1 else start.new_zeros(len(start), 0)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes, vectors[:, 0].square()
