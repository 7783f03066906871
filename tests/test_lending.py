"""Heads that read another stage's weights: where they cannot be had in time they are refused."""

from __future__ import annotations

import pytest
import torch

import unlocked as ul
from unlocked.errors import InvalidChoice
from unlocked.heads import SharedUnembeddingHead


def test_cyclic_replicas_do_not_lend():
    """Under cdp a stage's weights come into place when its forward reads them, sooner in one world than in another."""
    torch.manual_seed(0)
    model = ul.models.build("gpt", input_shape=(4,), classes=7, layers=2, width=8, heads=2)
    chain = ul.cut(model, 2, like=torch.zeros(2, 4, dtype=torch.int64))
    rule = ul.credit.DGL(head=SharedUnembeddingHead(period=1), budget=None)
    for form in ("ring", "single-device"):
        with pytest.raises(InvalidChoice, match="not in place before its forward"):
            ul.Trainer(
                chain,
                credit=rule,
                consensus=ul.consensus.CDP(form=form),
                replicas=2,
                optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1),
            )
