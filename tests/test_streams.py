"""Streams of one device: whatever one stream made is used by another only after a wait for it.

There is no GPU here, so streams only keep books (vector clocks), and a dispatch mode looks at every operation for races.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unlocked as ul

from methods import assert_same, batch, consensus_rules, credits, mlp, state, trainer

OUTSIDE = "outside"


class Books:
    """The streams of a run: what each knows to be done of every other."""

    def __init__(self, forgetful=None):
        self.now = [OUTSIDE]
        self.known = defaultdict(lambda: defaultdict(int))
        self.forgetful = forgetful  # a kind of wait that is left out
        self.made = 0

    def make(self, device, own):
        self.made += own
        return BookStream(self, f"stream {self.made}" if own else OUTSIDE)


class BookStream:
    def __init__(self, books, name):
        self.books, self.name = books, name

    @contextlib.contextmanager
    def current(self):
        self.books.now.append(self.name)
        try:
            yield
        finally:
            self.books.now.pop()

    def mark(self):
        return dict(self.books.known[self.name])

    def wait(self, moment):
        if self.books.forgetful == (
            "outside" if self.name == OUTSIDE or (OUTSIDE in moment and len(moment) == 1) else "stream"
        ):
            return
        mine = self.books.known[self.name]
        for name, count in moment.items():
            mine[name] = max(mine[name], count)

    def use(self, x):
        pass


class Races(TorchDispatchMode):
    """Every operation reads after the last write, and writes after the last write and all reads, of other streams."""

    def __init__(self, books):
        super().__init__()
        self.books, self.found = books, []
        self.written, self.read, self.kept = {}, defaultdict(dict), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = self.books.now[-1]
        known = self.books.known[here]
        known[here] += 1
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = function(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        own = {x.untyped_storage()._cdata for x in inputs}
        changed = inputs[:1] if function._schema.is_mutable else []
        for x in inputs:
            self.check(x, self.written.get(self.key(x)), known, function)
            self.read[self.key(x)][here] = known[here]
        for x in [*changed, *(x for x in outputs if x.untyped_storage()._cdata not in own)]:
            for other, count in self.read[self.key(x)].items():
                self.check(x, (other, count), known, function)
            self.written[self.key(x)] = (here, known[here])
        return result

    def key(self, x):
        storage = x.untyped_storage()
        self.kept[storage._cdata] = storage  # no address is used twice
        return storage._cdata

    def check(self, x, event, known, function):
        if event is not None and known[event[0]] < event[1]:
            self.found.append(f"{function}: {tuple(x.shape)} of {event[0]} is used by {self.books.now[-1]}")


def trained(credit, rule, world, races=None):
    session = trainer(
        credit.make(),
        rule.make(),
        stages=3,
        replicas=2,
        world=world,
        accumulate=2,
        model=mlp(3, norm=True, dropout=0.1),
    )
    with races or contextlib.nullcontext():
        for k in range(3):
            session.step(*batch(24, seed=k))
        session.drain()
    return session


@pytest.mark.covering
@pytest.mark.parametrize("credit", credits(), ids=lambda row: row.name)
@pytest.mark.parametrize(
    "rule", [row for row in consensus_rules() if row.name in ("all-reduce", "wash")], ids=lambda row: row.name
)
def test_no_stream_uses_what_another_has_not_made_yet(credit, rule):
    expected = state(
        trained(credit, rule, ul.worlds.InProcess())
    )  # first, as it makes the tables on the CPU that all share
    books = Books()
    races = Races(books)
    session = trained(credit, rule, ul.worlds.InProcess(streams=books.make), races)
    assert books.made == 6
    assert not races.found, races.found[:3]
    assert_same(state(session), expected)


@pytest.mark.parametrize("forgetful", ["stream", "outside"])
def test_a_wait_that_is_left_out_is_found(forgetful):
    (credit,) = [row for row in credits() if row.name == "pipedream"]
    (rule,) = [row for row in consensus_rules() if row.name == "all-reduce"]
    books = Books(forgetful)
    races = Races(books)
    trained(credit, rule, ul.worlds.InProcess(streams=books.make), races)
    assert races.found


def test_streams_want_a_cuda_device():
    session = trainer(ul.credit.Backprop(), world=ul.worlds.InProcess(streams=True))
    with pytest.raises(ul.UnlockedError, match="streams=True is for stages on a CUDA device, not on cpu"):
        session.step(*batch())
