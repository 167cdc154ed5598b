"""Grouping vectors that point the same way: k-means on directions, and its relatives.

This room knows matrices, not modules. Filters are few and long (512 × 4608 in VGG-16), so k-means runs on the n × n
matrix of inner products instead of the rows themselves: with S[i, c] = Σ_{j in c} x_i·x_j and N_c = ‖Σ_{j in c}
x_j‖² every distance, every objective and every move follows, an iteration costs O(n²) and not O(n·k·d), and
restarts run as one batch.
"""

from __future__ import annotations

from .partition import METHODS, Clustering, Method, cluster, directions, merging_inertias, moved

__all__ = [
    "METHODS",
    "Clustering",
    "Method",
    "cluster",
    "directions",
    "merging_inertias",
    "moved",
]
