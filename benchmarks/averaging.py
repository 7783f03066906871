"""Time per update and bytes of the rules that average now and then, on a slow network, under the simulated clock.

    python benchmarks/averaging.py                            ResNet-18, 4 replicas, 32 images each, 1 TFLOP/s each
    python benchmarks/averaging.py --bandwidths 1e7 1e9       other networks, in bytes a second

Shapes only: nothing is trained. The time of an update is the mean over whole periods, against that of one device alone with the
same images and stages, which is the least there is. Encoding and decoding cost nothing here. Bytes are the mean over four
periods, so they hold the first exchange of local-sgd, papa and easgd, which travels whole, and lack what is still on its way at
the end. Ends with one line RESULT {json}.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import unlocked as ul
from unlocked import simulation as sim
from unlocked.consensus import CO2, EASGD, PAPA, AllReduce, Consensus, DiLoCo, Independent, LocalSGD, SlowMo
from unlocked.simulation.simulating import seconds_per_update

from common import result

RULES: dict[str, Consensus] = {
    "all-reduce": AllReduce(),
    "all-reduce, int8": AllReduce(compression="int8"),
    "local-sgd(8)": LocalSGD(period=8),
    "local-sgd(8), overlap 7": LocalSGD(period=8, overlap=7),
    "local-sgd(8), int8": LocalSGD(period=8, compression="int8"),
    "local-sgd(8), overlap 7, int8": LocalSGD(period=8, overlap=7, compression="int8"),
    "local-sgd(8), top 1 %": LocalSGD(period=8, compression="topk:0.01"),
    "papa(10)": PAPA(period=10),
    "papa(10), overlap 9": PAPA(period=10, overlap=9),
    "slowmo(8)": SlowMo(period=8),
    "co2(8)": CO2(period=8),
    "easgd(8)": EASGD(period=8),
    "easgd(8), asynchronous": EASGD(period=8, asynchronous=True),
    "diloco(32)": DiLoCo(period=32),
    "diloco(32), 4 fragments, overlap 7": DiLoCo(period=32, fragments=4, overlap=7, mixing=0.5),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument(
        "--stages", type=int, default=1, help="more than one: under dgl, with activations on the same network"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--flops", type=float, default=1e12)
    parser.add_argument("--latency", type=float, default=1e-4)
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[1.25e7, 1.25e8, 1.25e9])
    return parser.parse_args()


def measured(
    rule: Consensus, costs: sim.Costs, hardware: sim.Hardware, replicas: int, samples: int
) -> tuple[float, float]:
    """(seconds per update, bytes that leave a replica per update), of whole cycles after the first two."""
    cycle = rule.cycle(len(costs)) if replicas > 1 else 1
    steps = 4 * cycle
    credit = ul.credit.DGL() if len(costs) > 1 else ul.credit.Backprop()
    timeline = sim.simulate(
        credit, rule, costs=costs, replicas=replicas, steps=steps, samples=samples, hardware=hardware
    )
    seconds = max(seconds_per_update(timeline, 2 * cycle).values())
    among = sum(act.bytes for act in timeline if act.kind == "M" or (act.kind == "S" and act.peer[1] == act.stage))
    return seconds, among / replicas / steps


def main() -> None:
    """Measure and print."""
    options = arguments()
    model = ul.models.build("resnet18", input_shape=(3, 32, 32), classes=10)
    chain = ul.cut(model, options.stages, like=torch.randn(2, 3, 32, 32))
    ul.credit.DGL().prepare(chain, 0)
    costs = sim.costs_of(sim.profile(chain), sim.Device(flops=options.flops))
    weights = sum(x.numel() * x.element_size() for x in chain.parameters())
    table = Table("rule", "bytes / Ψ_P", *(f"{b * 8 / 1e6:g} Mbit/s" for b in options.bandwidths))
    rows = {}
    for name, rule in RULES.items():
        ratios, sent = [], 0.0
        for bandwidth in options.bandwidths:
            hardware = sim.Hardware(network=sim.uniform(options.latency, bandwidth))
            alone, _ = measured(Independent(), costs, hardware, 1, options.samples)
            seconds, sent = measured(rule, costs, hardware, options.replicas, options.samples)
            ratios.append(seconds / alone)
        rows[name] = {"bytes": sent / weights, "ratios": ratios}
        table.add_row(name, f"{sent / weights:.4f}", *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=120).print(table)
    print(f"time of an update against one device alone; {options.replicas} replicas, {options.stages} stage(s)")
    result({"replicas": options.replicas, "stages": options.stages, "bandwidths": options.bandwidths, "rows": rows})


if __name__ == "__main__":
    main()
