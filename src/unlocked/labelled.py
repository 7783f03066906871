"""Labelled data to score a network on: that of a network which learned without labels is probed with (`probe_on`).

Training images may have no labels at all. A linear probe is then fitted to labelled images of another set, and scored on more
of them. The network knows images normalised by the statistics of its training data only, so these are normalised in the same
way, whatever their own statistics are.
"""

from __future__ import annotations

import dataclasses

import torch

from .credit import Credit
from .data import Data, Domains
from .errors import BadData, InvalidChoice


def refuse_probe(credit: Credit) -> None:
    """Raises InvalidChoice for a rule whose networks have a classifier of their own."""
    if not credit.self_supervised:
        raise InvalidChoice(
            f"{credit.name} learns from labels, and its network is scored by its own classifier; labelled data for a probe are "
            "for rules that learn from views, such as dgssl and simclr: leave out probe_on (--probe-on)."
        )


def check_scoring(credit: Credit, trained: Data | Domains | None, probe_on: Data | None, held_out: Data | None) -> None:
    """Whether a network that learns by this rule from `trained` can be scored on `held_out`, by a probe fitted to `probe_on`.

    Raises what `refuse_probe` and `as_trained` do; BadData for held-out data without labels where there is no probe.
    """
    if probe_on is not None:
        refuse_probe(credit)
        for one in (probe_on, held_out):
            if one is not None:
                as_trained(trained, one)
    elif held_out is not None and not credit.self_supervised:
        refuse_unlabelled(held_out)


def refuse_unlabelled(data: Data) -> None:
    """Raises BadData for data that have no labels."""
    if not data.labelled:
        raise BadData(
            f"{data.name!r} has no labels, so no accuracy can be had of it; give labelled data (probe_on; on the "
            "command line --probe-on, and --data of unlocked probe)."
        )


def as_trained(trained: Data | Domains | None, given: Data) -> Data:
    """Labelled images, normalised as those that the network was trained on (of domains: the first).

    Bytes get the statistics of `trained`; numbers of another type stay as they are. Raises BadData: no labels of classes, a
    shape or a type that does not fit, or bytes where it is not known what the network was trained on.
    """
    refuse_unlabelled(given)
    if given.y is None or given.y.is_floating_point():
        raise BadData(
            f"The targets of {given.name!r} are no classes, which a probe is to tell apart; give labelled images."
        )
    first = trained.sets[0] if isinstance(trained, Domains) else trained
    if first is None:
        if given.x.dtype != torch.uint8:
            return given
        raise BadData(
            f"{given.name!r} has to be normalised as the training data were, which are not known before fit, nor after a "
            "resume; give them as train=."
        )
    if given.input_shape != first.input_shape:
        raise BadData(
            f"The network learned from samples of shape {first.input_shape} ({first.name!r}), but those of {given.name!r} have "
            f"the shape {given.input_shape}; make them equal."
        )
    if given.x.dtype != torch.uint8:
        return given
    if first.x.dtype != torch.uint8:
        raise BadData(
            f"{given.name!r} holds bytes, but the network learned from numbers of type {first.x.dtype} ({first.name!r}), so "
            "how to normalise them is not known; give them as such numbers."
        )
    return dataclasses.replace(given, mean=first.mean, std=first.std)
