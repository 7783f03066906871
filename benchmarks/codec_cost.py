"""What it takes to encode and decode a million values, per codec of averaging rules.

    python benchmarks/codec_cost.py

One thread, float32. Median of --rounds. "with feedback": what error feedback adds is in it. Ends with one line RESULT {json}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from unlocked.consensus.averaging.codecs import ErrorFeedback, codec, payload_bytes

from common import result

CODECS = ("bf16", "int8", "topk:0.001", "topk:0.01", "topk:0.1")
COUNT = 1_000_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    row = torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
    rows = {}
    for name in CODECS:
        one = codec(name)
        feedback, payload = ErrorFeedback(one), one.encode(row)
        times = {
            "encode": _microseconds(lambda one=one: one.encode(row), rounds),
            "decode": _microseconds(lambda one=one, payload=payload: one.decode(payload, row), rounds),
            "with feedback": _microseconds(lambda feedback=feedback: feedback.send("row", row), rounds),
        }
        rows[name] = times | {"bytes": payload_bytes(payload) / (4 * COUNT)}
        words = ", ".join(f"{what} {value:,.0f} µs" for what, value in times.items())
        print(f"{name:12} {words}; bytes {rows[name]['bytes']:.4f} of float32's")
    result(rows)


def _microseconds(call: Callable[[], Any], rounds: int) -> float:
    call()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - begin))
    return median(found)


if __name__ == "__main__":
    main()
