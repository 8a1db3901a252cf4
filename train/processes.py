"""The processes of a run: they meet before JAX starts, and notice when one ends.

JAX waits in silence for a process that does not come, and ends the others with a stack
trace, a minute after one has died. So the processes first meet at the address of the
coordinator, where each says its number. One that is missing, or is there twice, is
named. The connections stay open until a process has done its work: if one closes
before, the process at its other end has died.
"""

import atexit
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from train.errors import UsageError, see

# Seconds to wait for a process.
_PATIENCE = 25.0
_HEARTBEAT = 20  # for one whose machine has no power or network any more

_Message = dict[str, Any]

_done = threading.Event()  # this process needs no other any more


def start_distributed(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    show: Callable[[str], None],
) -> None:
    """Joins the processes of a run, if there are several.

    Launchers that JAX knows (SLURM, Open MPI, TPU pods) say in the environment which
    process this is. Without one, all three arguments are needed. From then on, this
    process ends with exit code 1 if another one ends before its work is done.

    Args:
      coordinator: "HOST:PORT" of the first process.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      show: called with a line that says for whom this process waits.

    Raises:
      UsageError: if only some of the arguments are given, if they are wrong, or if
        processes do not join within 25 seconds.
    """
    if coordinator is None and num_processes is None and process_id is None:
        if not _launched_with_others():
            return
        address = None
    else:
        if coordinator is None or num_processes is None or process_id is None:
            raise UsageError(
                "coordinator, num_processes and process_id belong together: give all "
                "three, or none under SLURM, Open MPI or on a TPU"
                + see("machines.md#one-run-on-all-of-them")
            )
        address = _parse_address(coordinator)
        if num_processes < 1:
            raise UsageError(f"num_processes must be at least 1, got {num_processes}")
        if not 0 <= process_id < num_processes:
            raise UsageError(
                f"process_id must be from 0 to {num_processes - 1}, got {process_id}"
            )
    peers: dict[int, _Peer] = {}
    if address and num_processes and process_id is not None and num_processes > 1:
        if process_id == 0:
            peers = _gather(address[1], num_processes, show)
        else:
            peers = {0: _join(address, num_processes, process_id, show)}
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"cannot join the other processes: {error}"
            + see("machines.md#one-run-on-all-of-them")
        ) from error
    if peers:
        atexit.register(_say_goodbye, peers)  # before JAX waits for the others
        threading.Thread(target=_watch, args=(peers,), daemon=True).start()


def _launched_with_others() -> bool:
    # Not SLURM_NTASKS: commands that srun has not started see it too.
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name) or 1) > 1 for name in sizes):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _parse_address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(
            f"coordinator must be HOST:PORT with a port from 1 to 65535, got "
            f"{coordinator!r}"
        )
    return host.strip("[]"), int(port)


class _Peer:
    """The connection to another process, for messages of one line."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Sends a message, unless the other process is gone."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> _Message | None:
        """Returns the next message; None if the other process is gone.

        Raises:
          TimeoutError: if there is none before the timeout of the connection.
        """
        while b"\n" not in self._rest:
            try:
                data = self.connection.recv(4096)
            except TimeoutError:
                raise
            except OSError:
                data = b""
            if not data or len(self._rest) > 1 << 16:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:  # from a program that is not one of ours
            return None
        return message if isinstance(message, dict) else None


def _gather(
    port: int, num_processes: int, show: Callable[[str], None]
) -> dict[int, _Peer]:
    """Waits for all other processes, as process 0."""
    peers: dict[int, _Peer] = {}
    with _listening(port) as server:
        try:
            _wait_for_all(server, num_processes, peers, show)
        except UsageError as error:
            for peer in peers.values():
                peer.send(error=str(error))
            raise
    for peer in peers.values():
        peer.send(ready=True)
    return peers


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=both, backlog=1024
        )
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UsageError(
            f"process 0 cannot use port {port} ({reason}): choose another port, or "
            "give this process another process_id if there is a process 0"
        ) from error
    with server:
        yield server


def _wait_for_all(
    server: socket.socket,
    num_processes: int,
    peers: dict[int, _Peer],
    show: Callable[[str], None],
) -> None:
    deadline = time.monotonic() + _PATIENCE

    def missing() -> str:
        numbers = [i for i in range(1, num_processes) if i not in peers]
        shown = ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
        return f"process{'es' * (len(numbers) > 1)} {shown}"

    show(f"process 0 waits up to {_PATIENCE:.0f} s for {missing()}")
    while len(peers) < num_processes - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            raise UsageError(
                f"{missing()} of {num_processes} did not join within {_PATIENCE:.0f} s:"
                " start all with the same coordinator, or lower num_processes"
                + see("machines.md#one-run-on-all-of-them")
            ) from None
        connection.settimeout(5)
        peer = _Peer(connection)
        with contextlib.suppress(TimeoutError):
            hello = peer.receive()
            if hello is None or not isinstance(hello.get("process_id"), int):
                continue
            problem = ""
            if hello.get("num_processes") != num_processes:
                problem = (
                    f"process {hello['process_id']} was started with num_processes "
                    f"{hello.get('num_processes')}, and process 0 with {num_processes}"
                )
            elif hello["process_id"] in peers:
                problem = (
                    f"two processes have the process_id {hello['process_id']}: give "
                    f"each its own, from 0 to {num_processes - 1}"
                )
            if problem:
                peer.send(error=problem)
                raise UsageError(problem)
            peers[hello["process_id"]] = peer


def _join(
    address: tuple[str, int],
    num_processes: int,
    process_id: int,
    show: Callable[[str], None],
) -> _Peer:
    """Tells process 0 that this one is there, and waits for the others."""
    where = f"{address[0]}:{address[1]}"
    show(f"process {process_id} waits up to {_PATIENCE:.0f} s for process 0 at {where}")
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            peer = _Peer(socket.create_connection(address, timeout=5))
            break
        except socket.gaierror as error:
            raise UsageError(
                f"there is no host {address[0]!r} ({error.strerror}): check coordinator"
            ) from error
        except OSError as error:  # process 0 may not have come so far
            if time.monotonic() > deadline:
                raise UsageError(
                    f"process 0 cannot be reached at {where} ({error}): start it, or "
                    "check coordinator" + see("machines.md#one-run-on-all-of-them")
                ) from error
            time.sleep(0.2)
    peer.send(process_id=process_id, num_processes=num_processes)
    peer.connection.settimeout(_PATIENCE + 5)
    try:
        answer = peer.receive()
    except TimeoutError:
        answer = None
    if answer is None or not answer.get("ready"):
        problem = (answer or {}).get("error", f"process 0 at {where} has ended")
        raise UsageError(str(problem))
    return peer


def _watch(peers: dict[int, _Peer]) -> None:
    """Ends this process when another has ended before its work was done."""
    with selectors.DefaultSelector() as selector:
        for number, peer in peers.items():
            peer.connection.settimeout(None)
            selector.register(peer.connection, selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select():
                peer = peers[key.data]
                message = peer.receive()
                if message == {"done": True}:
                    selector.unregister(peer.connection)
                elif _done.is_set():
                    return
                else:
                    _end((message or {}).get("lost", key.data), peers)


def _end(lost: int, peers: dict[int, _Peer]) -> NoReturn:
    for peer in peers.values():
        peer.send(lost=lost)
    print(
        f"error: process {lost} has ended, and this one cannot go on without it: see "
        "its output, and start all of them again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _say_goodbye(peers: dict[int, _Peer]) -> None:
    _done.set()
    for peer in peers.values():
        peer.send(done=True)
