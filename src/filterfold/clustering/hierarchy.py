"""How well rows cluster at every number of clusters, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import directions


def merging_inertias(x: Tensor) -> Tensor:
    """What is lost by merging the rows of `x`, shape `(n, d)`, two by two: inertia with 1, 2, … n clusters.

    Ward, "Hierarchical grouping to optimize an objective function" (1963), on directions: each merge is the one that
    raises Σ ‖direction - cluster mean‖² least. The whole curve costs about as much as one k-means, whose inertia at
    each number it exceeds by some percent; it never rises with the number of clusters.

    **Returns:** shape `(n,)`, float64 on the CPU; entry k - 1 is for k clusters.

    ```python
    >>> merging_inertias(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])).round(decimals=3).tolist()
    [1.333, 0.0, 0.0]

    ```
    """
    from scipy.cluster.hierarchy import ward

    if len(x) == 1:
        return torch.zeros(1, dtype=torch.float64)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows = directions(x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32))
        gram = (rows @ rows.T).double().cpu()
    square = gram.diagonal()
    distance = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0).sqrt()
    above = torch.triu_indices(len(x), len(x), 1)
    heights = torch.from_numpy(ward(distance[above[0], above[1]].numpy())[:, 2].copy())
    lost = (heights.square() / 2).cumsum(0)  # after 1, 2, … n - 1 merges; a height is √2 × root of what it adds
    return torch.cat((lost.flip(0), lost.new_zeros(1)))
