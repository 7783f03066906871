"""Methods as short texts: `credit[+mitigation][/consensus][@replicas]`, as in `dgl(head=mlp)/wash(p=0.001)@3`.

A rule is its name, and in brackets the parameters that differ from their defaults. A value is a Python literal, a bare
word (text), a path (/tmp/x, runs/x), a head with options (mlp(depth=2)), or an expression of the number of stages J: `J`,
`J-1`, `J+1`, `J//2`. Nothing is ever evaluated as code.
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from . import consensus as consensus_rules
from . import credit as credit_rules
from . import mitigation as mitigations
from .consensus import Consensus
from .credit import Credit
from .errors import InvalidChoice, choose
from .heads.budget import HEADS
from .heads.spec import HeadSpec
from .mitigation import Mitigation
from .option_types import fit

_FORM = re.compile(r"(?P<name>[A-Za-z0-9][\w-]*)\s*(?:\((?P<inside>.*)\))?", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_]\w*(?:-[A-Za-z_]\w*)*", re.ASCII)
_PART = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)  # a quoted text, or one letter
_CONVOLUTIONS = re.compile(r"(=\s*)(\d+c\d+f)\b(?!\s*\()")  # heads' names that begin with a digit may, too
_WITH_OPTIONS = re.compile(r"(=\s*)(\d+c\d+f\s*\()")  # which no call in Python does; it gets a letter for the while
_LETTER = "head_"
_PATH = re.compile(r"(=\s*)((?!J\s*//)[\w.~-]*/[^\s,()]*)")  # may stand without quotes
_STAGES = re.compile(r"J(?:\s*(?P<sign>-|\+|//)\s*(?P<number>\d+))?")


@dataclass(frozen=True)
class OfStages:
    """A whole number that depends on the number of stages J: J, J-k, J+k or J//k."""

    sign: str = ""
    number: int = 0

    def at(self, stages: int) -> int:
        """Its value for J = `stages`."""
        if self.sign == "//":
            return stages // self.number
        return stages - self.number if self.sign == "-" else stages + self.number

    def __str__(self) -> str:
        return f"J{self.sign}{self.number}" if self.sign else "J"


@dataclass(frozen=True)
class Call:
    """A rule's name and the parameters given to it; `str` is the text that parses back to it."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{key}={show(value)}" for key, value in self.options)
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True)
class Method:
    """Credit, consensus, replicas, mitigation; `str` is the text that parses back to it, `slug` the same as a folder's name."""

    credit: Call
    consensus: Call = Call("independent")
    replicas: int = 1
    mitigation: Call | None = None

    def __str__(self) -> str:
        consensus = "" if self.consensus == Call("independent") else f"/{self.consensus}"
        mitigation = "" if self.mitigation is None else f"+{self.mitigation}"
        return f"{self.credit}{mitigation}{consensus}" + (f"@{self.replicas}" if self.replicas > 1 else "")

    @property
    def slug(self) -> str:
        """`dgl(head=mlp)/wash(p=0.001)@3` → `dgl-head-mlp--wash-p-0.001--x3`."""
        calls = [self.credit, *([] if self.mitigation is None else [self.mitigation])]
        calls += [] if self.consensus == Call("independent") else [self.consensus]
        parts = [re.sub(r"[^\w.+-]", "-", str(call)).rstrip("-") for call in calls]
        return "--".join([*parts, f"x{self.replicas}"] if self.replicas > 1 else parts)


# ---- text → value ----------------------------------------------------------------------------------------------------


def literal(text: str) -> Any:
    """A Python literal, or a bare word as itself. Raises InvalidChoice."""
    text = text.strip()
    if _is_word(text):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise InvalidChoice(
            f"{text!r} is no value; give a number, a word, True, False, None, or a text in quotes, as in 'runs/a.v1'."
        ) from error


def value(text: str) -> Any:
    """As `literal`, and expressions of J, and heads with options, as in `mlp(depth=2)`."""
    found = _STAGES.fullmatch(text.strip())
    if found is None:
        form = _FORM.fullmatch(text.strip())
        return literal(text) if form is None or form["inside"] is None else _head(parse_call(text))
    sign, number = found["sign"] or "", int(found["number"] or 0)
    if sign == "//" and number == 0:
        raise InvalidChoice(f"{text!r} divides by zero; give a divisor of at least 1.")
    return OfStages(sign, number)


def _head(call: Call) -> HeadSpec:
    """The head of this name with other options. Raises InvalidChoice."""
    usual = HEADS[choose("head", call.name, HEADS)]
    hints, options = get_type_hints(type(usual)), {}
    for key, given in call.options:
        if not parameters(type(usual)):
            raise InvalidChoice(f"The head {call.name} has no options; leave out {key!r}.")
        choose(f"option of the head {call.name}", key, parameters(type(usual)))
        if isinstance(given, OfStages):
            raise InvalidChoice(
                f"{key}={given} of the head {call.name} cannot depend on the number of stages; give a number."
            )
        options[key] = fit(f"{call.name}'s {key}", given, hints[key])
    return dataclasses.replace(usual, **options)  # type: ignore[type-var]  # heads are dataclasses


def _show_head(head: HeadSpec) -> str:
    fields = [field.name for field in dataclasses.fields(head)]  # type: ignore[arg-type]
    name = head.name if head.name in HEADS else next(name for name, one in HEADS.items() if type(one) is type(head))
    other = [(key, getattr(head, key)) for key in fields if getattr(head, key) != getattr(HEADS[name], key)]
    return str(Call(name, tuple(other)))


def show(given: Any) -> str:
    """The text that `value` reads back."""
    if any(type(given) is type(one) for one in HEADS.values()):
        return _show_head(given)
    if isinstance(given, str) and _is_word(given) and not _STAGES.fullmatch(given):
        return given
    if isinstance(given, str) and _CONVOLUTIONS.fullmatch(f"={given}"):
        return given
    return str(given) if isinstance(given, OfStages) else repr(given)


def _is_word(text: str) -> bool:
    """Whether the text may stand without quotes; Python's own words (True, None, if, …) may not."""
    return _WORD.fullmatch(text) is not None and not any(map(keyword.iskeyword, text.split("-")))


def parse_call(text: str) -> Call:
    """`name` or `name(key=value, …)`. Raises InvalidChoice; the names are checked by `make_credit`, `make_consensus`."""
    form = _FORM.fullmatch(text.strip())
    if form is None:
        raise InvalidChoice(f"{text!r} cannot be read; write a rule as name or name(key=value,…), e.g. dgl(head=mlp).")
    inside = (form["inside"] or "").strip()
    if not {"'", '"'} & set(inside):
        inside = _CONVOLUTIONS.sub(r"\1'\2'", _PATH.sub(r"\1'\2'", inside))
    inside_read = _WITH_OPTIONS.sub(rf"\1{_LETTER}\2", inside)
    source = f"f({inside_read})"
    try:
        parsed = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        parsed = None
    if not isinstance(parsed, ast.Call) or not isinstance(parsed.func, ast.Name) or parsed.args:
        raise InvalidChoice(
            f"The parameters {inside!r} of {form['name']} cannot be read; write them as key=value,…, "
            "with quotes around a text that is more than a word, as in oracle='my runs/simclr'."
        )
    options: list[tuple[str, Any]] = []
    for given in parsed.keywords:
        if given.arg is None or given.arg in dict(options):
            raise InvalidChoice(f"The parameters {inside!r} of {form['name']} name one twice or none; write key=value.")
        text_of = ast.get_source_segment(source, given.value) or ""
        options.append((given.arg, value(re.sub(rf"^{_LETTER}(?=\d)", "", text_of))))
    return Call(form["name"], tuple(options))


def parse_method(text: str) -> Method:
    """`credit[+mitigation][/consensus][@replicas]`. Raises InvalidChoice for texts of another form and unknown rules."""
    calls, replicas = text.strip(), 1
    counted = re.fullmatch(r"(.*)@\s*(\d+)", calls, re.DOTALL)
    if counted:
        calls, replicas = counted[1], int(counted[2])
    first, *more = _outside_brackets(calls, "/")
    first, *mitigated = _outside_brackets(first, "+")
    given = [first, *more, *mitigated]
    if len(more) > 1 or len(mitigated) > 1 or replicas < 1 or not all(part.strip() for part in given):
        raise InvalidChoice(
            f"{text!r} is no method; write credit, credit/consensus or credit/consensus@replicas, e.g. dgl/wash(p=0.001)@3."
        )
    method = Method(
        parse_call(first),
        parse_call(more[0]) if more else Call("independent"),
        replicas,
        parse_call(mitigated[0]) if mitigated else None,
    )
    choose("credit rule", method.credit.name, _names(credit_rules.ALL))
    choose("consensus rule", method.consensus.name, _names(consensus_rules.ALL))
    if method.mitigation is not None:
        choose("mitigation", method.mitigation.name, _names(mitigations.ALL))
    return method


def _outside_brackets(text: str, separator: str) -> list[str]:
    """Split where the separator stands outside all brackets and quotes."""
    parts, depth = [""], 0
    for part in _PART.findall(text):
        depth += (part == "(") - (part == ")")
        if part == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += part
    return parts


# ---- value → rule ----------------------------------------------------------------------------------------------------


def make_credit(call: Call, stages: int) -> Credit:
    """The credit rule that `call` names, for J = `stages`. Raises InvalidChoice, naming the nearest valid one."""
    return _make("credit rule", call, credit_rules.ALL, stages)


def make_consensus(call: Call, stages: int) -> Consensus:
    """The consensus rule that `call` names, for J = `stages`. Raises InvalidChoice, naming the nearest valid one."""
    return _make("consensus rule", call, consensus_rules.ALL, stages)


def make_mitigation(call: Call | None, stages: int) -> Mitigation | None:
    """The mitigation that `call` names, for J = `stages`. Raises InvalidChoice, naming the nearest valid one."""
    return None if call is None else _make("mitigation", call, mitigations.ALL, stages)


def parameters(kind: type) -> dict[str, Any]:
    """A rule's parameters and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def _names(kinds: Iterable[Any]) -> list[str]:
    return [kind.name for kind in kinds]


def _make(what: str, call: Call, kinds: Sequence[Any], stages: int) -> Any:
    choose(what, call.name, _names(kinds))
    kind = next(kind for kind in kinds if kind.name == call.name)
    hints = get_type_hints(kind)
    options = {}
    for key, given in call.options:
        if not parameters(kind):
            raise InvalidChoice(f"{call.name} has no parameters; leave out {key!r}.")
        choose(f"parameter of {call.name}", key, parameters(kind))
        value = given.at(stages) if isinstance(given, OfStages) else given
        options[key] = fit(f"{call.name}'s {key}", value, hints[key])
        if key == "head" and isinstance(options[key], str):
            choose("head", options[key], HEADS)
    return kind(**options)
