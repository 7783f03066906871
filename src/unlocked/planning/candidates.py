"""What a plan tries: every mesh of stages × replicas worth looking at, under every rule.

meshes   J a divisor of the number of devices D or a power of two; N = D // J, and under rules that split one batch also
         half as many replicas, a quarter, …, as a slow network may want fewer; one device alone
rules    all; with one stage the credit rule does not matter, unless it learns without labels, with one replica the consensus
         rule does not, and an interlocking distance of J − 1 or more is backprop: such twins are tried once
parts    as many micro-batches per update as asked for, or as a rule needs on so many stages (pipedream-2bw)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import consensus as consensus_rules
from .. import credit as credit_rules
from ..credit.delayed import Delayed
from ..credit.two_versions import TwoVersions
from ..method_names import Call, Method, make_consensus, make_credit, parse_call

BACKPROP = Call("backprop")

_VARIANTS: dict[str, tuple[str, ...]] = {
    "gpipe": ("gpipe", "gpipe(micro_batches=8)", "gpipe(micro_batches=16)"),
    "1f1b": ("1f1b", "1f1b(micro_batches=8)", "1f1b(micro_batches=16)"),
    "interlocking": ("interlocking", "interlocking(d=2)"),
}


@dataclass(frozen=True)
class Candidate:
    """A method on J stages; `accumulate`: micro-batches per update."""

    method: Method
    stages: int
    accumulate: int = 1

    @property
    def devices(self) -> int:
        """One for every worker."""
        return self.stages * self.method.replicas

    def __str__(self) -> str:
        return f"{self.method} on {_counted(self.stages, 'stage')}"


def candidates(
    devices: Sequence[int], accumulate: int = 1, credit: Sequence[str] = (), consensus: Sequence[str] = ()
) -> Iterator[Candidate]:
    """All that is tried on each of these numbers of devices, one after the other, twins left out.

    credit, consensus: only these rules, as texts. Raises InvalidChoice.
    """
    credits, consensuses = _calls(credit, credit_rules.ALL), _calls(consensus, consensus_rules.ALL)
    for call in credits:
        make_credit(call, max(devices))
    for call in consensuses:
        make_consensus(call, max(devices))
    unsupervised = [call for call in credits if make_credit(call, max(devices)).self_supervised]
    of_one = [*unsupervised, *([BACKPROP] if len(unsupervised) < max(1, len(credits)) else [])]
    seen = {Candidate(Method(first), 1, accumulate): None for first in of_one}
    for count in devices:
        for stages in depths(count):
            for first in of_one if stages == 1 else credits:
                if not _is_backprop_in_disguise(first, stages):
                    for method in _methods(first, consensuses, count // stages, stages):
                        fewest = make_consensus(method.consensus, stages).fewest
                        seen[Candidate(method, stages, max(_parts(first, stages, accumulate), fewest))] = None
    yield from seen


def _methods(credit: Call, consensuses: Sequence[Call], most: int, stages: int) -> Iterator[Method]:
    """The rule alone, unless that is one device, and with at most so many replicas."""
    if stages > 1:
        yield Method(credit)
    delayed = isinstance(make_credit(credit, max(stages, 2)), Delayed)
    for call in consensuses:
        if delayed and make_consensus(call, stages).one_at_a_time:  # refused by the trainer
            continue
        for replicas in _widths(most, make_consensus(call, stages).shares_data):
            yield Method(credit, call, replicas)


def left_out(credit: Sequence[str] = (), consensus: Sequence[str] = ()) -> list[str]:
    """The rules that cannot be simulated, by name."""
    rules: tuple[Any, ...] = (*credit_rules.ALL, *consensus_rules.ALL)
    kinds = {kind.name: kind for kind in rules}
    named = {parse_call(text).name for text in (*credit, *consensus)}
    return [name for name, kind in kinds.items() if kind.needs_processes and (not named or name in named)]


def unasked() -> list[str]:
    """The rules that are tried only if they are named."""
    kinds: tuple[Any, ...] = (*credit_rules.ALL, *consensus_rules.ALL)
    return [kind.name for kind in kinds if not kind.planned]


def depths(devices: int) -> list[int]:
    """Numbers of stages: divisors of the number of devices, and powers of two."""
    return [j for j in range(1, devices + 1) if devices % j == 0 or j & (j - 1) == 0]


def _widths(most: int, shares_data: bool) -> Iterator[int]:
    replicas = most
    while replicas > 1:
        yield replicas
        if not shares_data:  # fewer networks are no faster, one by one
            return
        replicas //= 2


def _calls(texts: Sequence[str], kinds: Sequence[Any]) -> list[Call]:
    """The rules given, or all that are tried unasked, with their variants; those that leave the communicating to PyTorch are
    left out."""
    simulated = [kind.name for kind in kinds if not kind.needs_processes]
    if texts:
        return [call for call in map(parse_call, texts) if call.name in simulated or call.name not in _names(kinds)]
    tried = [name for name in simulated if name not in unasked()]
    return [parse_call(text) for name in tried for text in _VARIANTS.get(name, (name,))]


def _names(kinds: Sequence[Any]) -> list[str]:
    return [kind.name for kind in kinds]


def _parts(call: Call, stages: int, accumulate: int) -> int:
    """Micro-batches per update: a power of two where a rule needs more, so that most batches divide evenly."""
    two_versions = isinstance(make_credit(call, stages), TwoVersions)
    return max(accumulate, 1 << (stages - 2).bit_length()) if two_versions else accumulate


def _is_backprop_in_disguise(call: Call, stages: int) -> bool:
    rule = make_credit(call, stages)
    return isinstance(rule, credit_rules.Interlocking) and rule.d >= stages - 1 and stages > 1


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
