"""Two network namespaces joined by a cable (a veth pair): two "hosts" on one machine, with a link as slow as one likes.

    with two_hosts() as (a, b):
        a.limit(mbit=50); b.limit(mbit=50)
        server = a.start([sys.executable, …]); client = b.start([…])

Each has the loopback, one interface, an address 10.x.y.1 or .2, and no way to anywhere else. Leaving the context kills what
was started inside and removes the namespaces. Needs root and iproute2: see `why_not`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_COMMAND_WITHIN = 20.0  # seconds


class Host:
    """One of the two: `namespace` and `interface` are its names, `address` is how the other one reaches it."""

    def __init__(self, namespace: str, interface: str, address: str) -> None:
        self.namespace, self.interface, self.address = namespace, interface, address
        self._started: list[subprocess.Popen[str]] = []

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command inside, in a session of its own; `options` are Popen's. It is killed at the end of the context."""
        options = {"text": True, "start_new_session": True} | options
        process = subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], **options)
        self._started.append(process)
        return process

    def limit(self, mbit: float, burst: str = "256kb", latency: str = "400ms") -> None:
        """Let at most so many Mbit/s leave this host; what waits for longer than `latency` is dropped. Limit both hosts to
        make the cable slow in both directions."""
        rate = ["tbf", "rate", f"{round(mbit * 1e6)}bit", "burst", burst, "latency", latency]
        _run("tc", "-n", self.namespace, "qdisc", "replace", "dev", self.interface, "root", *rate)

    def unlimit(self) -> None:
        """Take the limit away."""
        _run("tc", "-n", self.namespace, "qdisc", "del", "dev", self.interface, "root")

    def cut(self) -> None:
        """Unplug the cable."""
        _run("ip", "-n", self.namespace, "link", "set", self.interface, "down")

    def kill(self) -> None:
        """End everything that was started here, with its children."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in _run(
            "ip", "netns", "pids", self.namespace, check=False
        ).split():  # those with a session of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def two_hosts(mbit: float | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by a cable, which carries `mbit` Mbit/s each way if given."""
    name, net = f"ul{secrets.token_hex(3)}", f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
    hosts = tuple(Host(f"{name}{side}", f"{name}{side}", f"{net}.{number}") for number, side in ((1, "a"), (2, "b")))
    a, b = hosts
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
        ends = ["name", a.interface, "netns", a.namespace, "type", "veth"]
        _run("ip", "link", "add", *ends, "peer", "name", b.interface, "netns", b.namespace)
        for host in hosts:
            _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            _run("ip", "-n", host.namespace, "link", "set", host.interface, "up")
            if mbit is not None:
                host.limit(mbit)
        yield a, b
    finally:
        for host in hosts:
            if Path("/run/netns", host.namespace).exists():
                host.kill()
                _run("ip", "netns", "del", host.namespace, check=False)  # its end of the cable goes with it


@cache
def why_not() -> str | None:
    """Why there can be no namespaces here, or None if there can."""
    if sys.platform != "linux":
        return "network namespaces are a feature of Linux"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command {tool!r} is missing (apt-get install iproute2)"
    try:
        with two_hosts(mbit=50):
            return None
    except (subprocess.SubprocessError, OSError) as error:
        return f"network namespaces are not permitted here ({getattr(error, 'stderr', None) or error})".strip()


def _run(*command: str, check: bool = True) -> str:
    found = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_WITHIN, check=check)
    return found.stdout
