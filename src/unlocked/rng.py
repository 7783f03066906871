"""Seeds as pure functions of what they are for.

Everything random in the library (data order, augmentation, dropout, permutations, initial heads) is drawn from a
generator seeded by `seed_of(run seed, what, when, where)`. So a resumed run needs integers, not generator states, and
a worker draws the same numbers in every world.
"""

from __future__ import annotations

import hashlib

import torch

_MASK = (1 << 64) - 1


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of integers and words; different sequences give independent seeds."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def mix(seed: int, *counters: int) -> int:
    """`seed_of` for hot paths: a 63-bit seed from one seed and small counters (splitmix64 finaliser, ~0.5 µs)."""
    z = seed
    for counter in counters:
        z = (z + 0x9E3779B97F4A7C15 * (counter + 1)) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return z >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))
