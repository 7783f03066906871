"""Those entries of a sparse matrix's inverse that lie where the matrix has one (Takahashi, Fagan & Chin 1973).

    A = L D Lᵀ,   Z = A⁻¹
    Z_Sj = − Z_SS l_j,      Z_jj = 1/d_j − l_jᵀ Z_Sj          S: rows of column j of L below its diagonal, l_j = L_Sj

from the last column to the first. Z_SS is known by then: S lies in the rows of column p = min S, with p itself. It costs about
as much as the factorisation, where a solve for each entry would cost as many solves.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import SuperLU

from .graph import Floats, Integers

FILL = 0.05  # share of the entries; beyond it dense columns are faster than small blocks


def selected_inverse(factor: SuperLU, rows: Integers, columns: Integers) -> Floats | None:
    """(len(rows),): Z at these places, each of which A or L has.

    factor: of a positive definite A without pivoting: the same order for rows and columns. None: L has too many entries for
    this to pay, or A was not factorised symmetrically.
    """
    lower, size = factor.L.tocsc(), factor.shape[0]
    if lower.nnz > FILL * size**2 or not np.array_equal(factor.perm_r, factor.perm_c):
        return None
    lower.sort_indices()
    first, below = lower.indptr, lower.indices
    entries = _columns(first, below, lower.data, factor.U.diagonal())
    places = np.repeat(np.arange(size), np.diff(first)) * size + below  # ascending
    order = factor.perm_c.astype(np.int64)
    i, j = order[rows], order[columns]
    return entries[np.searchsorted(places, np.minimum(i, j) * size + np.maximum(i, j))]


def _columns(first: Integers, below: Integers, values: Floats, pivots: Floats) -> Floats:
    """(entries of L,): Z at the places of L. A block is Z on the rows of a column; it is kept until its last child had it."""
    size, found = len(pivots), np.empty(len(values))
    sole = np.diff(first) == 1
    parent = np.where(sole, -1, below[np.minimum(first[:-1] + 1, len(below) - 1)])
    children = np.bincount(parent[~sole], minlength=size)
    blocks: dict[int, Floats] = {}
    for j in range(size - 1, -1, -1):
        here = slice(first[j], first[j + 1])
        rows, line, p = below[here][1:], values[here][1:], int(parent[j])
        block = np.empty((len(rows) + 1, len(rows) + 1))
        block[0, 0] = 1.0 / pivots[j]
        if len(rows):
            inside = np.searchsorted(below[first[p] : first[p + 1]], rows)
            block[1:, 1:] = blocks[p][np.ix_(inside, inside)]
            block[0, 1:] = block[1:, 0] = -(block[1:, 1:] @ line)
            block[0, 0] -= line @ block[0, 1:]
            children[p] -= 1
            if not children[p]:
                del blocks[p]
        found[here] = block[0]
        if children[j]:
            blocks[j] = block
    return found
