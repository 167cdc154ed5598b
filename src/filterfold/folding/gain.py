"""With what factor a unit's output is best replaced by another's, from their batch norms and directions alone.

Behind batch norm z_j ~ N(β_j, γ_j²), and two units' correlation is about the cosine ρ of their filters (exactly so
for white inputs). The next layer reads y = relu(z). Its own batch norm takes care of constants, so the factor is
that of linear regression, Cov(y_j, y_r) / Var(y_r): 1 for equal units, smaller the less they agree.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_NODES = 24


def regression(
    gamma: Tensor, beta: Tensor, own_gamma: Tensor, own_beta: Tensor, cosine: Tensor, otherwise: Tensor
) -> Tensor:
    """Factors, shape `(n,)`, never negative.

    **Arguments**, all of shape `(n,)` in float64:

    - `gamma`, `beta`: scale and shift of the units.
    - `own_gamma`, `own_beta`: those of each unit's representative.
    - `cosine`: between the filters of unit and representative.
    - `otherwise`: what to return where the representative's output hardly varies.

    >>> one, half = torch.ones(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
    >>> zero = 0 * one
    >>> regression(2 * one, zero, one, zero, one, one).item(), regression(one, zero, one, zero, half, one).item()
    (2.0, 0.43...)
    """
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(_NODES))
    first, second = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).reshape(-1, 1) / weights.sum() ** 2
    cosine = cosine.clamp(-1, 1)
    made = torch.relu(own_gamma * first + own_beta)
    unit = torch.relu(gamma * (cosine * first + (1 - cosine.square()).sqrt() * second) + beta)
    centred = made - (weight * made).sum(dim=0)
    variance = (weight * centred.square()).sum(dim=0)
    factor = (weight * centred * unit).sum(dim=0) / variance.where(variance > 0, 1)
    size = own_gamma.square() + own_beta.square()
    return torch.where(variance > 1e-6 * size, factor.clamp(min=0), otherwise)
