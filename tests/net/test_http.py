"""Where a URL can lead, seen from the sockets: no trick makes the worker connect to what it must not."""

import contextlib
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import trustme

from gradcam_worker.errors import UriNotAllowed
from gradcam_worker.net import dialer
from gradcam_worker.net.http import HttpClient, HttpFailed, HttpResponse
from gradcam_worker.settings import Settings
from tests.net.ssrf_urls import (
    HOSTS,
    PUBLIC_ADDRESS,
    PUBLIC_HOST,
    URLS,
    Names,
    forbidden_answers,
    forbidden_urls,
    permissive_hosts,
)

ELSEWHERE = "127.0.0.3"  # this machine too, and another address than the tricks'
SCHEMES = ("http", "https")


class Dialled:
    """Sees every connection that Python makes, and stops those that would leave this machine."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.thread: int | None = None
        sys.addaudithook(self._hear)  # for as long as the process lives: idle without a thread

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if event != "socket.connect" or threading.get_ident() != self.thread:
            return
        _, address = details
        self.addresses.append(address[0])
        if not address[0].startswith("127.") and address[0] != "::1":
            raise ConnectionRefusedError


@pytest.fixture(scope="module")
def hook() -> Dialled:
    return Dialled()


@pytest.fixture
def dialled(hook: Dialled) -> Iterator[list[str]]:
    """The addresses that this test connects to."""
    hook.addresses, hook.thread = [], threading.get_ident()
    yield hook.addresses
    hook.thread = None


@pytest.fixture(scope="module")
def listeners() -> Iterator[list[socket.socket]]:
    """The same port of 127.0.0.1 and, where there is IPv6, of ::1; nobody answers."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        found = [first]
        with contextlib.suppress(OSError):
            second = socket.create_server(("::1", first.getsockname()[1]), family=socket.AF_INET6)
            found.append(stack.enter_context(second))
        for listener in found:
            listener.setblocking(False)
        yield found


@pytest.fixture(scope="module")
def port(listeners: list[socket.socket]) -> int:
    number: int = listeners[0].getsockname()[1]
    return number


def reached(listeners: list[socket.socket]) -> int:
    """How many connections have come in."""
    count = 0
    for listener in listeners:
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                count += 1
    return count


@pytest.fixture(scope="module")
def strict() -> HttpClient:
    """What an operator would allow."""
    return HttpClient((PUBLIC_HOST,), SCHEMES, "GRADCAM_IMAGE_HOSTS")


@pytest.fixture(scope="module")
def open_door(port: int) -> HttpClient:
    """Every name that can be written down is allowed, and only the addresses are left to be judged."""
    return HttpClient(
        Settings(image_hosts=permissive_hosts(port)).image_hosts, SCHEMES, "GRADCAM_IMAGE_HOSTS"
    )


def get(web: HttpClient, url: str, seconds: float = 10) -> HttpResponse:
    return web.get(url, max_bytes=1000, seconds=seconds)


def refusal(web: HttpClient, url: str) -> str:
    """What is said when a URL is refused, for good."""
    with pytest.raises(UriNotAllowed) as caught:
        get(web, url)
    return str(caught.value)


class TestTricks:
    def test_the_table_is_long_and_says_nothing_twice(self) -> None:
        table = list(forbidden_urls(80))
        assert len({url for url, _ in table}) == len(table) == len(HOSTS) + len(URLS) >= 140

    def test_a_listener_hears_of_a_connection(
        self, port: int, listeners: list[socket.socket], dialled: list[str]
    ) -> None:
        """Or the tests below would prove nothing."""
        web = HttpClient((f"127.0.0.1:{port}",), SCHEMES, "X", ("127.0.0.0/8",))
        with pytest.raises(HttpFailed, match="timed out"):
            get(web, f"http://127.0.0.1:{port}/", 0.2)
        assert reached(listeners) == 1
        assert dialled == ["127.0.0.1"]

    def test_none_passes_the_list_of_hosts(
        self, strict: HttpClient, port: int, listeners: list[socket.socket], dialled: list[str]
    ) -> None:
        for url, why in forbidden_urls(port):
            said = refusal(strict, url)
            assert "is not allowed" in said or "is not a URL" in said, (url, why, said)
        assert not dialled
        assert not reached(listeners)

    def test_none_is_dialled_though_its_host_is_on_the_list(
        self, open_door: HttpClient, port: int, listeners: list[socket.socket], dialled: list[str]
    ) -> None:
        for host, why in HOSTS:
            said = refusal(open_door, f"http://{host}:{port}/a.jpg")
            assert "is not dialled: its address" in said, (host, why, said)
            assert "GRADCAM_PRIVATE_NETWORKS" in said
        assert not dialled
        assert not reached(listeners)

    def test_a_careless_list_of_hosts_helps_none(
        self, open_door: HttpClient, port: int, listeners: list[socket.socket], dialled: list[str]
    ) -> None:
        for url, _ in forbidden_urls(port):
            assert refusal(open_door, url)
        assert not dialled
        assert not reached(listeners)

    def test_a_webhook_is_refused_in_the_same_way(
        self, open_door: HttpClient, port: int, dialled: list[str]
    ) -> None:
        with pytest.raises(UriNotAllowed, match=r"127\.0\.0\.1 is loopback"):
            open_door.post(f"http://0x7f.1:{port}/hook", "{}", seconds=10)
        assert not dialled


class TestNames:
    def web(self, *found: tuple[str, ...], private: tuple[str, ...] = ()) -> tuple[HttpClient, Names]:
        names = Names(found)
        return HttpClient((PUBLIC_HOST,), SCHEMES, "GRADCAM_IMAGE_HOSTS", private, resolve=names), names

    def test_a_name_that_leads_inside_is_refused_whatever_else_it_leads_to(self, dialled: list[str]) -> None:
        found = list(forbidden_answers())
        web, _ = self.web(*(addresses for addresses, _ in found))
        for addresses, why in found:
            said = refusal(web, f"http://{PUBLIC_HOST}/a.jpg")
            assert f"{PUBLIC_HOST} is not dialled: its address" in said, (addresses, why, said)
        assert not dialled

    def test_the_address_that_was_judged_is_dialled_and_the_name_not_looked_up_again(
        self, dialled: list[str]
    ) -> None:
        web, names = self.web((PUBLIC_ADDRESS,), ("127.0.0.1",))
        with pytest.raises(HttpFailed):
            get(web, f"http://{PUBLIC_HOST}/a.jpg")
        assert dialled == [PUBLIC_ADDRESS]
        assert names.asked == [PUBLIC_HOST]
        with pytest.raises(UriNotAllowed, match=r"127\.0\.0\.1 is loopback"):
            get(web, f"http://{PUBLIC_HOST}/a.jpg")
        assert dialled == [PUBLIC_ADDRESS], "nothing is remembered that was true the last time"

    def test_a_name_that_turns_inside_between_two_redirects_is_refused(
        self, http_server: Any, answer: Any, dialled: list[str]
    ) -> None:
        http_server.url("/a", answer(302, headers={"location": "/b"}))
        names = Names([("127.0.0.1",), ("127.0.0.2",)])
        host = http_server.host.replace("127.0.0.1", PUBLIC_HOST)
        web = HttpClient((host,), SCHEMES, "X", ("127.0.0.1/32",), resolve=names)
        with pytest.raises(UriNotAllowed, match=r"127\.0\.0\.2 is loopback"):
            get(web, f"http://{host}/a")
        assert [path for path, _ in http_server.received] == ["/a"]
        assert dialled == ["127.0.0.1"]

    def test_all_addresses_of_a_name_are_tried(
        self, http_server: Any, answer: Any, dialled: list[str]
    ) -> None:
        http_server.url("/a", answer(200, b"x"))
        host = http_server.host.replace("127.0.0.1", PUBLIC_HOST)
        names = Names([(PUBLIC_ADDRESS, "127.0.0.1", "8.8.4.4")])
        web = HttpClient((host,), SCHEMES, "X", ("127.0.0.1",), resolve=names)
        assert get(web, f"http://{host}/a").body == b"x"
        assert dialled == [PUBLIC_ADDRESS, "127.0.0.1"]

    @pytest.mark.parametrize("found", [(), (PUBLIC_ADDRESS,)])
    def test_a_name_without_an_address_that_answers_may_have_one_later(
        self, found: tuple[str, ...], dialled: list[str]
    ) -> None:
        web, _ = self.web(found)
        with pytest.raises(HttpFailed):
            get(web, f"http://{PUBLIC_HOST}/a")

    def test_a_name_that_nobody_knows_may_be_known_later(self, dialled: list[str]) -> None:
        def unknown(host: str, port: int) -> list[str]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        web = HttpClient((PUBLIC_HOST,), SCHEMES, "X", resolve=unknown)
        with pytest.raises(HttpFailed, match=f"{PUBLIC_HOST} could not be looked up: .*not known"):
            get(web, f"http://{PUBLIC_HOST}/a")

    def test_names_below_a_domain_are_judged_like_any(self, dialled: list[str]) -> None:
        web = HttpClient(("*.example.com",), SCHEMES, "X", resolve=Names([("10.0.0.1",)]))
        for host in ("a.example.com", "10.0.0.1.example.com", "B.A.Example.Com"):
            with pytest.raises(UriNotAllowed, match=r"10\.0\.0\.1 is private"):
                get(web, f"http://{host}/a")
        for host in ("example.com", "badexample.com", "a.example.com.", "a.example.com:8080"):
            with pytest.raises(UriNotAllowed, match=r"is not allowed: X allows \*\.example\.com"):
                get(web, f"http://{host}/a")
        assert not dialled

    def test_a_name_server_that_hangs_holds_nothing_up_and_takes_a_bounded_number_of_threads(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dialer, "MAX_LOOKUPS", 3)
        end = threading.Event()

        def hanging(host: str, port: int) -> list[str]:
            end.wait(60)
            return []

        web = HttpClient((PUBLIC_HOST,), SCHEMES, "X", resolve=hanging)
        before = threading.active_count()
        try:
            for _ in range(6):
                with pytest.raises(HttpFailed, match=r"timed out after 0\.05 s"):
                    get(web, f"http://{PUBLIC_HOST}/a", 0.05)
            lookups = [thread for thread in threading.enumerate() if thread.name == "lookup"]
            assert len(lookups) == 3
        finally:
            end.set()
        for thread in lookups:
            thread.join(30)
        assert threading.active_count() <= before + 1, "one timer may be ending"
        with pytest.raises(HttpFailed, match="has no address"):
            get(web, f"http://{PUBLIC_HOST}/a")


@pytest.fixture(scope="module")
def redirecting() -> Iterator[ThreadingHTTPServer]:
    """A server that leads wherever its `away` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path[1:]) if self.path[1:].isdecimal() else 302)
            # Raw, since a hostile server is bound to no encoding.
            self.wfile.write(b"".join(self._headers_buffer))  # type: ignore[attr-defined]
            self.wfile.write(b"location: " + listener.away + b"\r\ncontent-length: 0\r\n\r\n")  # type: ignore[attr-defined]

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer((ELSEWHERE, 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, args=[0.05], daemon=True).start()
        yield listener
        listener.shutdown()


class TestRedirects:
    @pytest.fixture
    def host(self, redirecting: Any) -> str:
        return f"{ELSEWHERE}:{redirecting.server_port}"

    @pytest.fixture
    def web(self, host: str, port: int) -> HttpClient:
        return HttpClient((host, *permissive_hosts(port)), SCHEMES, "X", (f"{ELSEWHERE}/32",))

    def test_a_redirect_into_a_trick_is_not_followed(
        self,
        web: HttpClient,
        host: str,
        port: int,
        redirecting: Any,
        listeners: list[socket.socket],
        dialled: list[str],
    ) -> None:
        for url, why in forbidden_urls(port):
            if "\r" in url:  # would be two headers
                continue
            redirecting.away = url.encode()
            # A URL that is none is read as a path of the same server, which leads in circles.
            with pytest.raises((UriNotAllowed, HttpFailed)) as caught:
                get(web, f"http://{host}/302")
            assert re.search(
                "not dialled|not allowed|not a URL|redirects more than 3 times", str(caught.value)
            ), (url, why)
        assert set(dialled) == {ELSEWHERE}
        assert not reached(listeners)

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_every_kind_of_redirect_passes_the_same_door(
        self, status: int, web: HttpClient, host: str, port: int, redirecting: Any, dialled: list[str]
    ) -> None:
        redirecting.away = f"http://127.0.0.1:{port}/".encode()
        with pytest.raises(UriNotAllowed, match=r"127\.0\.0\.1 is loopback"):
            get(web, f"http://{host}/{status}")
        assert dialled == [ELSEWHERE]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@contextlib.contextmanager
def speaking_tls(authority: trustme.CA, name: str, says: bytes) -> Iterator[tuple[int, list[str | None]]]:
    """A TLS server with a certificate for a name; yields its port and the names that it was asked for."""
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    context.sni_callback = lambda _, host, __: asked.append(host)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(10)
                    with context.wrap_socket(connection, server_side=True) as encrypted:
                        encrypted.recv(65_536)
                        encrypted.sendall(says)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


class TestTls:
    @pytest.fixture
    def secure(self, authority: trustme.CA) -> Callable[[int], HttpClient]:
        """A client of PUBLIC_HOST, which is this machine, and which must say so in its certificate."""
        trusted = ssl.create_default_context()
        authority.configure_trust(trusted)

        def make(port: int) -> HttpClient:
            hosts = (f"{PUBLIC_HOST}:{port}",)
            return HttpClient(
                hosts, ("https",), "X", ("127.0.0.1",), resolve=Names([("127.0.0.1",)]), tls=trusted
            )

        return make

    def test_the_certificate_is_held_to_the_name_and_not_to_the_address(
        self, authority: trustme.CA, secure: Callable[[int], HttpClient]
    ) -> None:
        with speaking_tls(authority, PUBLIC_HOST, b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx") as (
            port,
            asked,
        ):
            assert get(secure(port), f"https://{PUBLIC_HOST}:{port}/").body == b"x"
        assert asked == [PUBLIC_HOST]

    @pytest.mark.parametrize("name", ["other.example.com", "127.0.0.1"])
    def test_a_certificate_for_another_name_is_not_taken(
        self, authority: trustme.CA, secure: Callable[[int], HttpClient], name: str
    ) -> None:
        with (
            speaking_tls(authority, name, b"HTTP/1.1 200 OK\r\n\r\n") as (port, _),
            pytest.raises(HttpFailed, match="certificate"),
        ):
            get(secure(port), f"https://{PUBLIC_HOST}:{port}/")

    def test_a_certificate_that_nobody_vouches_for_is_not_taken(self, authority: trustme.CA) -> None:
        with speaking_tls(authority, PUBLIC_HOST, b"HTTP/1.1 200 OK\r\n\r\n") as (port, _):
            hosts = (f"{PUBLIC_HOST}:{port}",)
            web = HttpClient(hosts, ("https",), "X", ("127.0.0.1",), resolve=Names([("127.0.0.1",)]))
            with pytest.raises(HttpFailed, match="certificate"):
                get(web, f"https://{PUBLIC_HOST}:{port}/")

    def test_a_redirect_does_not_lead_from_https_to_http(
        self, authority: trustme.CA, secure: Callable[[int], HttpClient]
    ) -> None:
        says = b"HTTP/1.1 302 Found\r\nlocation: http://%b:%d/\r\ncontent-length: 0\r\n\r\n"
        with socket.create_server(("127.0.0.1", 0)) as plain:
            away = says % (PUBLIC_HOST.encode(), plain.getsockname()[1])
            with speaking_tls(authority, PUBLIC_HOST, away) as (port, _):
                web = secure(port)
                with pytest.raises(UriNotAllowed, match=f"http://{PUBLIC_HOST}:.* is not allowed"):
                    get(web, f"https://{PUBLIC_HOST}:{port}/")
            plain.setblocking(False)
            assert not reached([plain])

    def test_tls_that_drips_is_cut_off_in_time(self, secure: Callable[[int], HttpClient]) -> None:
        end = threading.Event()
        hello = b"\x16\x03\x03\x40\x00" + bytes(0x4000)  # a record that is as long as one may be

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                for byte in hello:
                    connection.sendall(bytes([byte]))
                    if end.wait(0.05):
                        return

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=drip)
            thread.start()
            begun = time.monotonic()
            port = listener.getsockname()[1]
            try:
                with pytest.raises(HttpFailed, match=r"timed out after 0\.5 s"):
                    get(secure(port), f"https://{PUBLIC_HOST}:{port}/", 0.5)
                assert time.monotonic() - begun < 60, "it would have gone on for 800 s"
            finally:
                end.set()
                thread.join()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:planted@images.example.com/",
        "http://user:planted/@images.example.com/",
        "http://user:" + "planted" * 100 + "@images.example.com/",
        "http://images.example.com:planted/@x",
        "http://[planted@images.example.com/",
        "http://elsewhere.test/?token=planted",
        "http://user:planted\n@images.example.com",
    ],
)
def test_what_is_said_of_a_refused_url_holds_no_secret(strict: HttpClient, url: str) -> None:
    assert "planted" not in refusal(strict, url)


def test_headers_that_matter_go_both_ways(http_server: Any, answer: Any) -> None:
    url = http_server.url("/hook", answer(503, headers={"Retry-After": "7"}))
    web = HttpClient((http_server.host,), SCHEMES, "X", ("127.0.0.1",))
    said = web.post(url, '{"a": "\u00fc"}', seconds=10, headers={"webhook-id": "1"})
    assert said.status == 503
    assert said.headers["retry-after"] == "7"
    assert http_server.received == [("/hook", '{"a": "\u00fc"}'.encode())]
