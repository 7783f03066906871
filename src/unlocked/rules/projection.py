"""Projections of a gradient, the target, on directions that are guessed (F Eq. 4.1-4.6, Table 4.6).

    u = G / ‖G‖ if normalised, else G         the guess G as a direction
    ĝ = ⟨t, u⟩ u                              the estimate of the target t

What one scalar ⟨·,·⟩ spans is the insertion: a tensor of weights, all weights of a stage, or, for activations (B, …), one
sample, or one slice of a sample (patches × groups of channels: Ren et al. 2022). On several directions at once, as on an
orthonormal basis q of a span, ĝ = Σ_r ⟨t, q_r⟩ q_r.

Limits: t = c G, c ≠ 0, normalised: ĝ = t. A full basis: ĝ = t. E ĝ = t for u with E u uᵀ = 1 (Gaussian, Rademacher).

Legend: B samples, R directions for each sample, S tangents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit(guess: Tensor) -> Tensor:
    """G / ‖G‖ over all entries; 0 where G is 0. Neither overflows nor vanishes where ‖G‖² would."""
    return units(guess[None])[0]


def units(rows: Tensor) -> Tensor:
    """The same of every row (N, …) by itself."""
    flat = rows.reshape(len(rows), -1)
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / torch.where(largest > 0, largest, 1)
    norm = scaled.norm(dim=1, keepdim=True)
    return (scaled / torch.where(norm > 0, norm, 1)).view_as(rows)


def unit_together(guess: Sequence[Tensor]) -> list[Tensor]:
    """The same of several tensors as one long vector."""
    parts = unit(torch.cat([g.flatten() for g in guess])).split([g.numel() for g in guess])
    return [part.view_as(g) for part, g in zip(parts, guess)]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ over all entries."""
    return (a * b).sum()


def slices(guess: Tensor, patches: int, groups: int) -> Tensor:
    """(B, …) → (R, B, …): copies that are zero outside one slice, R = patches² · groups for maps; they add up to `guess`.

    Maps (B, C, H, W) have patches × patches windows and `groups` of channels (patches³ windows in volumes); (B, T, D) are cut
    along T into `patches`, vectors (B, D) and the last axis of (B, T, D) into `groups`. Parts differ by one entry where sizes
    do not divide.
    """
    channel = 2 if guess.dim() == 3 else 1
    axes = [(channel, groups), *((axis, patches) for axis in range(1, guess.dim()) if axis != channel)]
    found = [guess]
    for axis, parts in axes:
        found = [piece for one in found for piece in _parted(one, axis, min(parts, guess.shape[axis]))]
    return torch.stack(found)


def _parted(x: Tensor, axis: int, parts: int) -> list[Tensor]:
    if parts == 1:
        return [x]
    owner = torch.arange(x.shape[axis], device=x.device) * parts // x.shape[axis]
    shape = [-1 if k == axis else 1 for k in range(x.dim())]
    return [torch.where((owner == part).view(shape), x, 0) for part in range(parts)]


def directions(guess: Tensor, normalise: bool, patches: int = 1, groups: int = 1) -> Tensor:
    """(R, B, …): for each sample the directions its target is projected on, one for each slice of it."""
    found = slices(guess, patches, groups)
    return units(found.flatten(0, 1)).view_as(found) if normalise else found


def basis(guess: Tensor, components: int | None = None) -> Tensor:
    """(R, B, …): an orthonormal basis of the span of the batch's guesses, the same for every sample (F Table 4.6).

    components: its principal ones only. Directions that rounding alone makes are left out, so R ≤ min(B, entries).
    """
    rows = guess.flatten(1)
    scale = rows.abs().amax()
    _, values, vectors = torch.linalg.svd(
        (rows / torch.where(scale > 0, scale, 1)).to(_wide(rows)), full_matrices=False
    )
    tolerance = values.amax() * max(rows.shape) * torch.finfo(rows.dtype).eps
    found = vectors[(values > tolerance).nonzero().flatten()][:components].to(guess.dtype)
    return found.view(-1, 1, *guess.shape[1:]).expand(-1, *guess.shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def along(target: Tensor, directions: Tensor) -> Tensor:
    """(R, B): ⟨t_b, u_rb⟩ of targets (B, …) and directions (R, B, …)."""
    return (target * directions).flatten(2).sum(2)


def combined(scalars: Tensor, directions: Tensor) -> Tensor:
    """(B, …): Σ_r s_rb u_rb."""
    return (scalars.view(*scalars.shape, *[1] * (directions.dim() - 2)) * directions).sum(0)


def one_by_one(directions: Tensor) -> Tensor:
    """(R, B, …) → (R·B, B, …): each tangent moves one sample only, so its scalar is that sample's, whatever mixes samples."""
    b = directions.shape[1]
    eye = torch.eye(b, dtype=directions.dtype, device=directions.device)
    return (directions[:, None] * eye.view(1, b, b, *[1] * (directions.dim() - 2))).flatten(0, 1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a, b) over all entries; 0 if one of them is zero."""
    return dot(unit(a), unit(b))


def sample_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over samples of cos(a_b, b_b) (F Eq. 4.6); a sample with a zero gradient counts as 0."""
    return (units(a) * units(b)).sum() / len(a)
