"""The whole thing: a real Valkey, a real S3 server, real worker processes."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from selenium import webdriver

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Store, Stores

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # in which root may not start it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
)


@dataclass
class Stage:
    """Servers that run, and what is needed to talk to them."""

    settings: Settings
    s3: S3
    logs: Path

    @property
    def client(self) -> GradcamClient:
        return GradcamClient(settings=self.settings)

    @property
    def store(self) -> Store:
        return Stores(self.settings, self.s3).open()

    def put(self, name: str, data: bytes) -> str:
        """Store an image; return its URI."""
        self.s3.client.put_object(Bucket="photos", Key=name, Body=data)
        return f"s3://photos/{name}"

    @contextlib.contextmanager
    def worker(self, name: str, *, tiny: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """`gradcam worker`, supervisor and all, in a process of its own; `tiny`: without TensorFlow."""
        from devtools.faults import tiny_worker

        command = tiny_worker.command() if tiny else [sys.executable, "-P", "-m", "gradcam_worker", "worker"]
        process = parent_watch.spawn(
            command,
            log=self.logs / f"{name}.log",
            environment=self.settings.to_environment(),
            grace_s=self.settings.shutdown_timeout_s + 15,
        )
        try:
            yield process
        finally:
            parent_watch.stop(process)

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text()


@pytest.fixture(scope="session", autouse=True)
def _forked_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from devtools.faults import tiny_worker

    with tiny_worker.forked(tmp_path_factory.mktemp("forked")):
        yield


@pytest.fixture(scope="session")
def warm_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of programs, `gradcam` and `python`: see `devtools.warm_python`."""
    from devtools import warm_python

    with warm_python.running(tmp_path_factory.mktemp("warm"), warm_python.COMMANDS) as programs:
        yield programs


@pytest.fixture(scope="session")
def warm_tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same, which have TensorFlow, too."""
    from devtools import warm_python

    with warm_python.running(tmp_path_factory.mktemp("warm"), warm_python.TENSORFLOW) as programs:
        yield programs


@pytest.fixture(scope="session")
def make_stage(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, public_server: Any, redis_servers: dict[int, str]
) -> Iterator[Callable[..., Stage]]:
    """Each stage has servers of its own, so that tests do not take each other's jobs."""
    with contextlib.ExitStack() as stack:

        def make(name: str, **changes: Any) -> Stage:
            folder = tmp_path_factory.mktemp(name)
            queue = stack.enter_context(servers.valkey(folder))
            url = f"redis://127.0.0.1:{queue.port}/0"
            redis_servers[queue.port] = url
            stack.callback(redis_servers.pop, queue.port)
            store = stack.enter_context(servers.s3(folder, ("photos", "results", "private")))
            settings = Settings(
                broker_url=url,
                output="s3://results/cams",
                s3_endpoint_url=store.url,
                s3_access_key_id=store.access_key_id,
                s3_secret_access_key=SecretStr(store.secret_access_key),
                image_schemes=("s3", "http", "data"),
                image_buckets=("photos",),
                image_hosts=(public_server.host,),
                webhook_hosts=(public_server.host,),
                private_networks=("127.0.0.0/8",),
                max_image_bytes=1_000_000,
                visibility_timeout_s=6,
                retry_backoff_s=0.1,
                retry_backoff_max_s=1,
                threads=4,
                forward="tensorflow",  # OpenVINO takes seconds to convert a network
                max_batch=8,  # to measure it takes seconds, too
                shutdown_timeout_s=30,
                **{"lease_s": 3, "lost_after_s": 5, "preload": ("efficientnet_lite0",), **changes},
            )
            stage = Stage(settings, S3(settings), folder)
            for photo in photos.glob("*.jpg"):
                stage.put(photo.name, photo.read_bytes())
            return stage

        yield make


@pytest.fixture(scope="session")
def stage(make_stage: Callable[..., Stage]) -> Iterator[Stage]:
    """One stage with one worker, for all tests that leave it as it was."""
    stage = make_stage("stage")
    with stage.worker("worker"):
        yield stage


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A real browser, which all tests of pages share."""
    binary, program = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not program:
        missing = "chromium and chromedriver are not installed: scripts/browser installs them where it can"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(program))
    yield driver
    driver.quit()
