"""Every URL of `ssrf_urls`, as the image and as the webhook of a job, while this machine listens.

The lists of allowed hosts name whatever can be named: only the addresses are left to be refused.
"""

import contextlib
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from devtools.faults.cluster import Cluster, running_cluster, wait_for
from devtools.faults.observer import JobObserver, end_of
from gradcam_worker.errors import InvalidJob
from gradcam_worker.schemas.job import Job
from tests.net.ssrf_urls import forbidden_urls, permissive_hosts

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
DRAINS_S = 120.0
REFUSED = frozenset({"uri_not_allowed", "invalid_job"})
# A name that leads nowhere cannot be distinguished from one that leads nowhere just now.
NOWHERE = "image_fetch_failed"


class Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, connections: list[str]) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                connections.append(str(self.client_address))

        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)


@contextlib.contextmanager
def listening() -> Iterator[tuple[int, list[str]]]:
    """Listen at one port of this machine, over IPv4 and, where available, IPv6; yield it and who connects."""
    connections: list[str] = []
    with contextlib.ExitStack() as stack:
        port = 0
        for host in ("127.0.0.1", "127.255.255.254", "::1"):
            with contextlib.suppress(OSError):
                server = stack.enter_context(Listener(host, port, connections))
                port = server.server_address[1]
                threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
                stack.callback(server.shutdown)
        yield port, connections


def untried(cluster: Cluster) -> set[str]:
    """Recipients of webhooks to which no delivery has been tried to its end."""
    prefix = cluster.settings.key_prefix
    with cluster.ledger as server:
        known = {key.removeprefix(f"{prefix}events:") for key in server.scan_iter(f"{prefix}events:*")}
        members: Any = server.zrange(f"{prefix}parked", 0, -1)
        parked = {member.partition(" ")[0] for member in members}
        tried: Any = server.hkeys(f"{prefix}tries")
        return known - parked - set(tried)


def submit(cluster: Cluster, number: int, **changes: Any) -> Job | None:
    """A job with this URL in it, unless the client refuses it already."""
    with contextlib.suppress(InvalidJob):
        job = cluster.job(number, max_attempts=1, **changes)
        cluster.submit(job)
        return job
    return None


def test_no_trick_in_a_job_leads_a_worker_inside() -> None:
    with listening() as (port, connections):
        hosts = permissive_hosts(port)
        settings: dict[str, Any] = {
            "image_schemes": ("s3", "http", "https"),
            "image_hosts": hosts,
            "webhook_hosts": hosts,
            "private_networks": (),
            "fetch_timeout_s": 5,
        }
        with running_cluster("addresses", 1, **settings) as cluster, JobObserver(cluster) as observer:
            cluster.work()
            of_webhooks: set[str] = set()
            for number, (url, _) in enumerate(forbidden_urls(port)):
                submit(cluster, 2 * number, image=url)
                if job := submit(cluster, 2 * number + 1, webhooks=[{"url": url}]):
                    of_webhooks.add(job.id)
            observer.drain(DRAINS_S)
            wait_for(lambda: not untried(cluster), DRAINS_S, "every webhook is tried")
            # A webhook's address that cannot be refused by its text is refused when it is dialled.
            verdict = observer.verdict(
                faults=0,
                expected=lambda job_id: REFUSED | {"succeeded" if job_id in of_webhooks else NOWHERE},
            )
            ends = Counter(end_of(document) for document in observer.documents().values() if document)
    assert verdict.kept, verdict
    assert not connections, "nobody may have connected to this machine"
    assert verdict.jobs >= 200
    assert ends["uri_not_allowed"] >= 100
