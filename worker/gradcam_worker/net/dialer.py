"""How a host is dialled: looked up once, judged, and connected to at exactly the address that was judged.

A check of the name beforehand would be of no use: whoever runs its name server can answer with another
address the next time it is asked.
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

Resolve = Callable[[str, int], Sequence[str]]  # host, port -> addresses, the best first

MAX_LOOKUPS = 64  # at once: as many as a process with a GPU has jobs in hand
SHORTEST_S = 0.001  # a socket takes 0 for "do not wait at all"


def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host, as this machine finds them. Raises OSError."""
    # As bytes: Python would encode a string once more, by the older rules of IDNA.
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class Dialer(httpcore.NetworkBackend):
    """Dials public addresses, and those in the networks that are admitted; any thread may use it."""

    def __init__(self, admitted: Sequence[Network], resolve: Resolve = look_up) -> None:
        """`resolve` is asked once for each connection."""
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
        """Connect within `timeout` seconds, name server and all; httpcore calls this.

        Raises UriNotAllowed (without a connection), httpcore.ConnectError, httpcore.ConnectTimeout.
        """
        end = time.monotonic() + (timeout or 0.0)
        addresses = [ip_address(text) for text in dict.fromkeys(self._resolve_in_time(host, port, end))]
        self._check(host, addresses)
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for number, address in enumerate(addresses):
            # Each gets its share of the time, so that one that does not answer leaves some for the next.
            share = (end - time.monotonic()) / (len(addresses) - number)
            try:
                return self._sockets.connect_tcp(
                    str(address), port, max(share, SHORTEST_S), local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _check(self, host: str, addresses: Iterable[Address]) -> None:
        # One bad address condemns the name, though the others may be good: no public host has an internal
        # address among its own, and which of them is dialled must not depend on which of them answers.
        for address in addresses:
            if why := objection(address, self._admitted):
                message = (
                    f"{host} is not dialled: its address {address} is {why}. "
                    "Beside public addresses, only the networks in GRADCAM_PRIVATE_NETWORKS are."
                )
                raise UriNotAllowed(message)

    def _resolve_in_time(self, host: str, port: int, end: float) -> Sequence[str]:
        """Ask in a thread of its own: the system's resolver knows no time limit but its own, of minutes."""
        late = httpcore.ConnectTimeout(f"no name server answered in time for {host}")
        if not self._lookups.acquire(timeout=max(end - time.monotonic(), 0.0)):
            raise late
        found: Future[Sequence[str]] = Future()
        threading.Thread(
            target=self._resolve_in_thread, args=(host, port, found), name="lookup", daemon=True
        ).start()
        try:
            return found.result(max(end - time.monotonic(), 0.0))
        except TimeoutError as error:
            raise late from error
        except OSError as error:
            message = f"{host} could not be looked up: {error}"
            raise httpcore.ConnectError(message) from error

    def _resolve_in_thread(self, host: str, port: int, found: Future[Sequence[str]]) -> None:
        try:
            found.set_result(self._resolve(host, port))
        except BaseException as error:  # noqa: BLE001  # whoever waits for it raises it
            found.set_exception(error)
        finally:
            self._lookups.release()
