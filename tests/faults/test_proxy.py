"""The proxy does what it is told to, and no more."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from devtools.faults.proxy import Fault, FaultyProxy

WAIT_S = 10


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says everything back."""

    def serve(client: socket.socket) -> None:
        with client:
            try:
                while data := client.recv(65536):
                    client.sendall(data)
            except OSError:
                return

    def accept(listener: socket.socket) -> None:
        while True:
            client, (_, peer) = listener.accept()  # the peer may be gone already
            if peer == stopper:
                client.close()
                return
            threads.append(threading.Thread(target=serve, args=[client]))
            threads[-1].start()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as stop:
        stop.bind(("127.0.0.1", 0))
        stopper = stop.getsockname()[1]
        port = listener.getsockname()[1]
        accepting = threading.Thread(target=accept, args=[listener])
        accepting.start()
        yield port
        stop.connect(("127.0.0.1", port))
        accepting.join()
        for one in threads:
            one.join()


@pytest.fixture
def proxy(echo: int) -> Iterator[FaultyProxy]:
    with FaultyProxy(echo, seed=1) as proxy:
        yield proxy


@pytest.fixture
def connect(proxy: FaultyProxy) -> Iterator[Callable[[], socket.socket]]:
    opened = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", proxy.port), WAIT_S))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


def ask(client: socket.socket, data: bytes = b"hello") -> bytes:
    client.sendall(data)
    heard = b""
    while len(heard) < len(data):
        more = client.recv(65536)
        if not more:
            break
        heard += more
    return heard


def read_to_the_end(client: socket.socket) -> None:
    while client.recv(100):
        pass


def test_a_proxy_that_is_well_hands_on_what_comes(connect: Callable[[], socket.socket]) -> None:
    large = bytes(range(256)) * 4096
    client = connect()
    sender = threading.Thread(target=client.sendall, args=[large])  # both directions at once
    sender.start()
    heard = b""
    while len(heard) < len(large):
        heard += client.recv(65536)
    sender.join()
    assert heard == large


def test_latency_is_paid_in_either_direction(
    proxy: FaultyProxy, connect: Callable[[], socket.socket]
) -> None:
    with proxy.suffering(Fault(latency_s=0.1)):
        begun = time.monotonic()
        assert ask(connect()) == b"hello"
        assert time.monotonic() - begun >= 0.2


def test_bandwidth_bounds_what_comes_through(
    proxy: FaultyProxy, connect: Callable[[], socket.socket]
) -> None:
    with proxy.suffering(Fault(bytes_per_s=10_000)):
        begun = time.monotonic()
        ask(connect(), b"x" * 1000)
        assert time.monotonic() - begun >= 0.2


def test_slices_arrive_one_by_one_and_whole(proxy: FaultyProxy, connect: Callable[[], socket.socket]) -> None:
    with proxy.suffering(Fault(slice_bytes=2, latency_s=0.01)):
        client = connect()
        client.sendall(b"hello")
        pieces: list[bytes] = []
        while len(b"".join(pieces)) < 5:
            pieces.append(client.recv(100))
    assert b"".join(pieces) == b"hello"
    assert len(pieces) > 1


def test_a_reset_comes_in_the_middle(proxy: FaultyProxy, connect: Callable[[], socket.socket]) -> None:
    with proxy.suffering(Fault(reset=1)):
        client = connect()
        client.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            read_to_the_end(client)
    assert proxy.resets
    assert ask(connect()) == b"hello", "the next connection is a good one"


def test_a_half_open_connection_never_says_a_word_again(
    proxy: FaultyProxy, connect: Callable[[], socket.socket]
) -> None:
    client = connect()
    assert ask(client) == b"hello"
    client.settimeout(0.3)
    with proxy.suffering(Fault(half_open=True)), pytest.raises(TimeoutError):
        ask(client)
    with pytest.raises(TimeoutError):
        ask(client)  # what was lost on the way does not come later
    assert ask(connect()) == b"hello", "a new connection is a good one"


def test_garbage_has_the_length_of_an_answer_and_spoils_its_connection(
    proxy: FaultyProxy, connect: Callable[[], socket.socket]
) -> None:
    client = connect()
    with proxy.suffering(Fault(garbage=True)):
        heard = ask(client)
    assert len(heard) == 5
    assert heard != b"hello"
    with pytest.raises(ConnectionResetError):
        read_to_the_end(client)


def test_an_answer_of_its_own_keeps_the_server_out_of_it(
    proxy: FaultyProxy, connect: Callable[[], socket.socket]
) -> None:
    with proxy.suffering(Fault(answer=b"503")):
        client = connect()
        client.sendall(b"hello")
        assert client.recv(100) == b"503"


def test_the_server_behind_it_may_be_another_one(proxy: FaultyProxy, echo: int) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy.target = closed.getsockname()[1]
        with (  # as early as while it is connected
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", proxy.port), WAIT_S) as client,
        ):
            client.recv(1)
    proxy.target = echo
    with socket.create_connection(("127.0.0.1", proxy.port), WAIT_S) as client:
        assert ask(client) == b"hello"


def test_it_leaves_nothing_behind(echo: int) -> None:
    before = threading.active_count()
    with (
        FaultyProxy(echo) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), WAIT_S) as client,
    ):
        proxy.fault = Fault(half_open=True)
        client.sendall(b"hello")
    assert threading.active_count() <= before + 1  # the echo of the one connection may take its time
