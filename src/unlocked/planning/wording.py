"""A plan in words: the headline, the table, what does not fit, the assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..live import in_bytes as in_thousands
from ..method_names import make_credit, parse_call
from ..simulation.hardware import Hardware
from ..simulation.options import ClusterOptions
from . import accuracy
from .candidates import left_out, unasked
from .planner import Plan
from .predicting import STEPS, Infeasible, Row, Setting, in_bytes

_COLUMNS = (
    "method",
    "J",
    "dev.",
    "samples/s\nof one network",
    "× one\ndevice",
    "net-\nworks",
    "use\n%",
    "peak of the\nfullest device",
    "up",
    "down",
    "among\nreplicas",
    "delay",
    "bound by",
    "accuracy",
)
LEGEND = (
    "J stages; @N replicas; dev.: devices used. samples/s of one network: where several networks are trained at once "
    "(networks), each of them goes at that rate and through all of the data. × one device: against backprop (of rules "
    "without labels: the best of them) on the fastest one. use: share of the time in which devices compute. up, down, among "
    "replicas: bytes per update of the device that sends most. delay: updates between the weights of a forward and the update "
    "it causes, measured."
)


# ---- the headline ----------------------------------------------------------------------------------------------------


def headline(plan: Plan) -> str:
    """A few sentences."""
    best, single = plan.best, plan.single
    if best is None:
        return _nothing_fits(plan)
    if best.devices == 1:
        return _one_is_best(plan, best)
    sentences = [f"{_lead(plan, best)}: {_speed(best)}{_against(best, single)}; {best.bound_by}."]
    if single is not None and best.samples_per_second < single.samples_per_second:
        sentences.append(f"One device alone is faster: {_rate(single)} samples/s.")
    if not best.exact:
        sentences.append(f"Its updates are not those of one device ({best.accuracy}).")
        sentences.append(_best_exact(plan, single))
    return " ".join(filter(None, sentences))


def _one_is_best(plan: Plan, best: Row) -> str:
    if plan.devices == 1:
        return f"One device: {_name(best)}, {_speed(best)}; {best.bound_by}."
    first = f"One device is {_BEST[plan.objective]} {plan.devices}: {_name(best)}, {_speed(best)}."
    several = next((row for row in plan.rows if row.devices > 1 and row.networks == 1), None)
    if several is None:
        return first
    factor = _factor(several, best)
    return f"{first} The best of several for one network, {_name(several)}: {_speed(several)}, {factor} ×; {several.bound_by}."


_BEST = {
    "throughput": "at least as fast for one network as any number up to",
    "memory": "filled least, against any number up to",
    "bytes": "best, as it sends nothing, against any number up to",
}


def _lead(plan: Plan, best: Row) -> str:
    if plan.objective == "throughput":
        return f"Fastest is {_name(best)}"
    if plan.objective == "memory":
        return f"Smallest is {_name(best)}, {in_bytes(best.peak)} on its fullest device"
    return f"Least is sent by {_name(best)}, {in_thousands(best.bytes_step)} per update"


def _best_exact(plan: Plan, single: Row | None) -> str:
    exact = next((row for row in plan.rows if row.exact), None)
    if exact is None:
        return "Nothing that fits is exact."
    if exact.devices == 1:
        return f"With exact updates one device is best: {_speed(exact)}."
    return f"Best with exact updates: {_name(exact)}, {_speed(exact)}{_against(exact, single)}; {exact.bound_by}."


def _nothing_fits(plan: Plan) -> str:
    for one in plan.infeasible:
        remedy = f" What would help: {one.remedy}." if one.remedy else ""
        return f"Nothing fits. {one.method} on {_counted(one.stages, 'stage')}: {one.reason}{remedy}"
    return "Nothing fits."


def _name(row: Row) -> str:
    parts = f" in {row.accumulate} micro-batches" if row.accumulate > 1 else ""
    if row.devices == 1:
        return f"{row.method}{parts}"
    return f"{row.method}{parts} with {_counted(row.stages, 'stage')} on {row.devices} devices"


def _speed(row: Row) -> str:
    if row.networks > 1:
        return f"{_rate(row)} samples/s for each of {row.networks} networks"
    return f"{_rate(row)} samples/s"


def _against(row: Row, single: Row | None) -> str:
    if single is None:
        return " (one device alone cannot hold the network)"
    return f", {_factor(row, single)} × one device ({_rate(single)})"


def _rate(row: Row) -> str:
    return _number(row.samples_per_second)


def _factor(row: Row, single: Row | None) -> str:
    return "–" if single is None else f"{row.samples_per_second / single.samples_per_second:.2f}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


# ---- the table -------------------------------------------------------------------------------------------------------


def table(plan: Plan, limit: int | None) -> Table:
    """The first `limit` rows."""
    found = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for k, heading in enumerate(_COLUMNS):
        left = k in (0, len(_COLUMNS) - 2, len(_COLUMNS) - 1)
        found.add_column(
            heading, justify="left" if left else "right", overflow="fold", no_wrap=0 < k < len(_COLUMNS) - 1
        )
    for row in plan.rows[:limit]:
        found.add_row(*(escape(cell) for cell in cells(row, plan.single)))
    return found


def cells(row: Row, single: Row | None) -> list[str]:
    """One text per column."""
    return [
        row.method + (f", {row.accumulate} micro-batches" if row.accumulate > 1 else ""),
        str(row.stages),
        str(row.devices),
        _rate(row),
        _factor(row, single),
        str(row.networks),
        f"{100 * row.utilisation:.0f}",
        in_bytes(row.peak),
        in_thousands(row.bytes_up),
        in_thousands(row.bytes_down),
        in_thousands(row.bytes_replicas),
        str(row.delay),
        row.bound,
        row.accuracy,
    ]


def known(rows: Sequence[Row]) -> Iterator[str]:
    """What is known about the rules in these rows: a line for each that costs something, and for what is exact together."""
    names: dict[str, None] = {}
    for row in rows:
        credit, _, rest = row.method.partition("/")
        names |= dict.fromkeys(part.partition("(")[0].partition("@")[0] for part in (credit, rest) if part)
        if row.replicas > 1 and not rest:
            names["independent"] = None
    exact = [name for name in names if accuracy.of(name).exact]
    if exact:
        yield f"{', '.join(exact)}: exact, the same updates as one device (tests; BatchNorm sees its own samples only)"
    for name in names:
        if name not in exact:
            known = accuracy.of(name)
            yield f"{name}: {known.sentence} ({known.source})"


def refused(rows: Sequence[Infeasible], limit: int | None) -> Iterator[str]:
    """What does not fit, in groups; of each group the first `limit`."""
    headings = {"memory": "too large", "batch": "the batch does not divide", "cut": "cannot be cut or headed"}
    for kind, heading in headings.items():
        group = [row for row in rows if row.kind == kind]
        split = [row for row in group if row.instead]
        group = [row for row in group if not row.instead]
        if split:
            yield f"{heading} in one go: {len(split)}, listed above in micro-batches"
        if not group:
            continue
        yield f"{heading}: {len(group)}"
        merged: dict[tuple[str, str], list[str]] = {}
        for row in group:
            merged.setdefault((row.reason, row.remedy), []).append(f"{row.method} J={row.stages}")
        for (reason, remedy), names in list(merged.items())[:limit]:
            yield f"  {', '.join(names)}: {reason}" + (f" What would help: {remedy}." if remedy else "")
        if limit is not None and len(merged) > limit:
            yield f"  … and {len(merged) - limit} more reasons (--all)"


# ---- the assumptions -------------------------------------------------------------------------------------------------


def assumptions(
    setting: Setting,
    given: ClusterOptions,
    measured: bool,
    accumulate: int,
    credit: Sequence[str],
    consensus: Sequence[str],
) -> Iterator[str]:
    """What the figures rest on, a sentence each. `measured`: whether what is not given was, too, and not assumed."""
    hardware = setting.hardware
    device = hardware.device
    unlabelled = any(make_credit(parse_call(text), setting.devices).self_supervised for text in credit)
    yield (
        f"Device: {device.flops / 1e12:g} TFLOP/s really reached{_assumed(given.flops, measured)}, "
        f"{device.memory_bandwidth / 1e9:g} GB/s of memory bandwidth{_assumed(given.memory_bandwidth, measured)}, "
        + (
            f"{in_bytes(device.memory)} of memory."
            if device.memory is not None
            else "memory without limit (no --memory)."
        )
    )
    yield _network(hardware, given, measured)
    if hardware.speeds and any(speed != 1.0 for speed in hardware.speeds):
        yield (
            f"Speeds {', '.join(f'{x:g}' for x in hardware.speeds)}, else 1. Workers sit on the devices in "
            "their order, replica by replica, not where they would do best; if fewer devices are used, the fastest are."
        )
    yield (
        f"Batch: {setting.batch} samples per update of one network. Replicas share it under rules that split the data "
        "(all-reduce, cdp, acco, local-sgd, …); under the others (independent, wash, …) each of N networks has such a batch."
        + (f" Every batch is split into {accumulate} accumulated micro-batches." if accumulate > 1 else "")
        + (" Rules without labels train the network without its classifier, on two views of every sample." * unlabelled)
    )
    yield (
        "Time: counted operations / speed, and what is no matrix product by the memory's bandwidth; proportional to "
        "the samples, so launching kernels costs nothing and small batches are as efficient as large ones. "
        "Python, data and evaluation are free."
    )
    yield (
        f"Rates are of a full pipeline, from the later half of {STEPS} simulated updates or of two periods (under delayed "
        "rules after as many as fill it). Not simulated: what a rule does at the ends of epochs, and after its first `shared` "
        "updates; copies of weights that averaging rules keep. Stages share the FLOPs evenly."
    )
    yield (
        f"Memory: weights, gradients, state of {setting.optimizer}, tensors kept for the backward, copies of old weights under "
        "delayed rules, messages (two per channel); no temporary buffers, no fragmentation. Numbers have the type "
        "the network was given in; no recomputation, no sharding."
    )
    yield (
        "greedy: a sample counts once all stages have learnt from it, one after the other. predsim: its similarity "
        "matrix grows with the square of the batch, which is not counted."
    )
    if not consensus:
        yield "Rules that are tried only if they are named (--credit, --consensus): " + ", ".join(unasked()) + "."
    absent = left_out(credit, consensus)
    if absent:
        yield f"Not simulated, as PyTorch does the communicating: {', '.join(absent)}; measure them with unlocked compare."


def _network(hardware: Hardware, given: ClusterOptions, measured: bool) -> str:
    network = hardware.network
    if network.edges:
        return f"Network: {len(network.edges)} named links; a full-duplex wire each."
    text = (
        f"Network: {8 * network.edge.bandwidth / 1e9:g} Gbit/s{_assumed(given.bandwidth, measured)}, "
        f"{1e6 * network.edge.latency:g} µs{_assumed(given.latency, measured)} "
    )
    if network.per_node is None:
        return text + f"from every device to all others by one full-duplex wire; means go round a {network.collective}."
    inside = network.inside
    return text + (
        f"between nodes of {network.per_node}, which share that wire; inside a node {8 * inside.bandwidth / 1e9:g} "
        f"Gbit/s, {1e6 * inside.latency:g} µs."
    )


def _assumed(given: object, measured: bool) -> str:
    return "" if given is not None or measured else " (assumed)"
