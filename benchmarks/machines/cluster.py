"""Simulated nodes on one machine: network namespaces joined by a link of a given rate, and programs run in them.

    with two_nodes("200mbit") as cluster:
        done = cluster.run_ranks(["-m", "benchmarks.systems.exchange_rank"], per_node=2, seconds=300)

Two nodes are two network namespaces joined by a veth pair; what a node sends over it is shaped by tbf (token bucket) to
the rate, in both directions. Traffic inside a node goes over the loopback device of its namespace, unlimited. A node
has a hostname of its own, which both nodes can look up; processes and files are this machine's. It needs root and
iproute2 (`ip`, `tc`); why_not() says what is missing. `one_node` is this machine itself, for comparison: no namespace,
no root.

Namespaces, and so the hostnames, are called foreroute-PID-NUMBER-NODE. They are removed, with every process in them,
when the block is left, however it is left; those of a user that was killed are removed by the next one. Other users'
are left alone.
"""

import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
LINK = "veth0"  # name of a node's end of the link
_PREFIX = "foreroute"
_BURST = {"burst": "256kb", "latency": "50ms"}  # of tbf: a TCP segment of 64 kB must fit in it
_ETC = Path("/etc/netns")  # NAMESPACE/hosts is /etc/hosts in the namespace: see ip-netns(8)
_NAMED = 'hostname "$0" && exec "$@"'
_SSH = """#!/bin/sh
# ssh [options] HOST COMMAND... between the simulated nodes of benchmarks/machines/cluster.py
while case $1 in -[bFilop]) shift ;; -*) ;; *) false ;; esac do shift; done
node=$1 && shift && cd
exec env -i HOME="$HOME" PATH={here}:/usr/sbin:/usr/bin:/sbin:/bin {enter} sh -c "$*"
"""
_numbers = itertools.count()


class ClusterError(RuntimeError):
    """The nodes cannot be made; the text gives the reason in one line."""


@dataclass(frozen=True, slots=True)
class Node:
    """One simulated machine."""

    namespace: str | None  # None: this machine itself
    interface: str  # through which its ranks talk
    address: str

    @property
    def hostname(self) -> str:
        """The output of `hostname` in the node."""
        return self.namespace or socket.gethostname()

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs a command in the node; it has the process id of the command."""
        return [*_enter(self.namespace), *command] if self.namespace else [*command]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a process."""

    code: int | None  # exit code, or minus a signal's number; None: time was over and it was killed
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes that exist."""

    nodes: tuple[Node, ...]

    def run_ranks(
        self, arguments: Sequence[str], *, per_node: int, seconds: float, env: Mapping[str, str] | None = None
    ) -> list[Finished]:
        """Run `python ARGUMENTS` as a rank of its own `per_node` times on each node; return results in the order of
        ranks.

        Each process finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and
        GLOO_SOCKET_IFNAME.
        """
        port, commands = free_port(), []
        for number, node in enumerate(self.nodes):
            for local_rank in range(per_node):
                rank = {
                    "RANK": str(number * per_node + local_rank),
                    "WORLD_SIZE": str(len(self.nodes) * per_node),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(per_node),
                }
                variables = {**(env or {}), **self._meeting(node, port), **rank}
                commands.append((node, [sys.executable, *arguments], variables))
        return _run(commands, seconds)

    def run_nodes(
        self, command: Callable[[int], Sequence[str]], *, seconds: float, env: Mapping[str, str] | None = None
    ) -> list[Finished]:
        """Run command(node's number) once on each node, such as torchrun; return results in the order of nodes.

        Each finds MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME.
        """
        port = free_port()
        commands = [
            (node, command(number), {**(env or {}), **self._meeting(node, port)})
            for number, node in enumerate(self.nodes)
        ]
        return _run(commands, seconds)

    def run_first(self, command: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None) -> Finished:
        """Run a command on the first node, such as mpirun, which reaches the others by itself."""
        return _run([(self.nodes[0], command, env or {})], seconds)[0]

    def write_ssh(self, folder: Path) -> None:
        """Write a stand-in for ssh into a folder, to be put first in PATH: it runs commands in the nodes, by hostname.

        As with ssh, a command starts in the home folder with none of the caller's variables.
        """
        enter = shlex.join(_enter("NODE")).replace("NODE", '"$node"')
        (folder / "ssh").write_text(_SSH.format(enter=enter, here=shlex.quote(str(folder))))
        (folder / "ssh").chmod(0o755)

    def link_bytes(self) -> int:
        """Return the bytes that the nodes have sent to each other, protocol included."""
        total = 0
        for node in self.nodes:
            if node.namespace is not None:
                text = _call("ip", "-n", node.namespace, "-s", "-j", "link", "show", "dev", LINK)
                total += json.loads(text)[0]["stats64"]["tx"]["bytes"]
        return total

    def _meeting(self, node: Node, port: int) -> dict[str, str]:
        return {"MASTER_ADDR": self.nodes[0].address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": node.interface}


@contextmanager
def one_node() -> Iterator[Cluster]:
    """Return this machine as the only node; nothing is made."""
    yield Cluster((Node(None, "lo", "127.0.0.1"),))


@contextmanager
def two_nodes(rate: str | None) -> Iterator[Cluster]:
    """Make two nodes whose link has a rate such as "200mbit", or None for an unlimited one; remove them in the end.

    Raises:
        ClusterError: they cannot be made here, or the rate is none.
    """
    _remove_abandoned()
    first = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
    nodes = tuple(Node(f"{first}-{i}", LINK, f"10.77.0.{i + 1}") for i in range(2))
    names = [str(node.namespace) for node in nodes]
    with ExitStack() as stack:
        hosts = [f"{node.address} {node.hostname}" for node in nodes]
        for name in names:
            stack.callback(_remove, name)
            _call("ip", "netns", "add", name)
            (_ETC / name).mkdir(parents=True, exist_ok=True)
            (_ETC / name / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        _call("ip", "link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        for name, node in zip(names, nodes, strict=True):
            _call("ip", "-n", name, "addr", "add", f"{node.address}/24", "dev", LINK)
            if rate is not None:
                shape = itertools.chain(("rate", rate), *_BURST.items())
                _call("tc", "-n", name, "qdisc", "add", "dev", LINK, "root", "tbf", *shape)
            for device in (LINK, "lo"):
                _call("ip", "-n", name, "link", "set", device, "up")
        yield Cluster(nodes)


@cache
def why_not() -> str | None:
    """Return in one line the reason why two nodes cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "simulated nodes need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"simulated nodes need iproute2: there is no `{tool}`"
    try:
        with two_nodes("200mbit"):
            return None
    except ClusterError as error:
        return f"simulated nodes cannot be made here: {error}"


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ClusterError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ClusterError(f"`{' '.join(command)}`: {reason[-1]}")
    return done.stdout


def _enter(namespace: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", _NAMED, namespace]


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _call("ip", "netns", "list").splitlines() if line.strip()]


def _remove(name: str) -> None:
    """Kill every process in a namespace and remove it; the veth pair goes with it."""
    shutil.rmtree(_ETC / name, ignore_errors=True)
    try:
        while pids := _call("ip", "netns", "pids", name).split():
            for pid in pids:
                _kill(os.kill, int(pid))
            time.sleep(0.01)
        _call("ip", "netns", "del", name)
    except ClusterError:
        if name in _namespaces():  # otherwise it was never made, or another user removed it
            raise


def _remove_abandoned() -> None:
    """Remove the namespaces of users that are gone."""
    for name in _namespaces():
        prefix, *numbers = name.split("-")
        if prefix == _PREFIX and len(numbers) == 3 and not Path("/proc", numbers[0]).exists():
            _remove(name)


def free_port() -> int:
    """Return a port that no process uses; in new namespaces any is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _run(commands: Sequence[tuple[Node, Sequence[str], Mapping[str, str]]], seconds: float) -> list[Finished]:
    """Run all at once from the root of the checkout; when time is over, kill those still running with their
    children."""
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        started = []
        for node, command, variables in commands:
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = subprocess.Popen(
                node.inside(command),
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(_end, process)
            started.append((process, out, err))
        return [_finish(process, deadline, out, err) for process, out, err in started]


def _finish(process: "subprocess.Popen[bytes]", deadline: float, out: IO[str], err: IO[str]) -> Finished:
    code = None
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(process)
    for file in (out, err):
        file.seek(0)
    return Finished(code, out.read(), err.read())


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its children, also those that outlived it."""
    _kill(os.killpg, process.pid)
    process.wait()


def _kill(kill: Callable[[int, int], None], number: int) -> None:
    with suppress(ProcessLookupError):
        kill(number, signal.SIGKILL)
