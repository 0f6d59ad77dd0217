"""Connects to hosts: looks up a name once, checks its addresses, and connects to exactly a checked address.

Checking the name before the connection would not suffice: its name server may answer with another address the
next time (DNS rebinding).
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from ipaddress import ip_address

import httpcore

from gradcam_worker.errors import UriNotAllowed
from gradcam_worker.net.ip_policy import Address, Network, objection

Resolve = Callable[[str, int], Sequence[str]]  # host, port -> addresses, preferred ones first

MAX_LOOKUPS = 64  # at a time: the number of jobs that a process with a GPU runs
MIN_TIMEOUT_S = 0.001  # for a socket, 0 means "non-blocking"


def look_up(host: str, port: int) -> list[str]:
    """Return the addresses of a host by the system's resolver. Raises OSError."""
    # As bytes: Python would encode a string again, by the older rules of IDNA.
    results = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in results]


class Dialer(httpcore.NetworkBackend):
    """Connects to public addresses, and to those in admitted networks. Thread-safe."""

    def __init__(self, admitted: Sequence[Network], resolve: Resolve = look_up) -> None:
        """`resolve` is called once for each connection."""
        self._admitted, self._resolve = admitted, resolve
        self._sockets = httpcore.SyncBackend()
        self._lookups = threading.BoundedSemaphore(MAX_LOOKUPS)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect within `timeout` seconds, lookup included; httpcore calls this.

        Raises UriNotAllowed (before a connection), httpcore.ConnectError, httpcore.ConnectTimeout.
        """
        end = time.monotonic() + (timeout or 0.0)
        addresses = [ip_address(text) for text in dict.fromkeys(self._resolve_in_time(host, port, end))]
        self._check(host, addresses)
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for number, address in enumerate(addresses):
            # Each address gets a share of the time that is left, so that one without an answer leaves some.
            share = (end - time.monotonic()) / (len(addresses) - number)
            try:
                return self._sockets.connect_tcp(
                    str(address), port, max(share, MIN_TIMEOUT_S), local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _check(self, host: str, addresses: Iterable[Address]) -> None:
        # One forbidden address is enough to refuse the name: no public host has an internal address, and the
        # decision must not depend on which address answers.
        for address in addresses:
            if reason := objection(address, self._admitted):
                message = (
                    f"{host} is not dialled: its address {address} is {reason}. "
                    "Beside public addresses, only the networks in GRADCAM_PRIVATE_NETWORKS are."
                )
                raise UriNotAllowed(message)

    def _resolve_in_time(self, host: str, port: int, end: float) -> Sequence[str]:
        """Resolve in a new thread: the system's resolver has its own time limit, of minutes."""
        timed_out = httpcore.ConnectTimeout(f"no name server answered in time for {host}")
        if not self._lookups.acquire(timeout=max(end - time.monotonic(), 0.0)):
            raise timed_out
        result: Future[Sequence[str]] = Future()
        threading.Thread(
            target=self._resolve_in_thread, args=(host, port, result), name="lookup", daemon=True
        ).start()
        try:
            return result.result(max(end - time.monotonic(), 0.0))
        except TimeoutError as error:
            raise timed_out from error
        except OSError as error:
            message = f"{host} could not be looked up: {error}"
            raise httpcore.ConnectError(message) from error

    def _resolve_in_thread(self, host: str, port: int, result: Future[Sequence[str]]) -> None:
        try:
            result.set_result(self._resolve(host, port))
        except BaseException as error:  # noqa: BLE001  # the waiting thread raises it
            result.set_exception(error)
        finally:
            self._lookups.release()
