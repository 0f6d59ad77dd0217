"""The app of the HTTP API with the ledger in memory, and a client for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.gateway.access.caller import Access, Caller
from gradcam_worker.gateway.app import create_app
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, MemoryObjects, MemoryStore, RecordingPublisher, eager_client

RED = cv2.imencode(".png", np.full((32, 32, 3), (0, 0, 255), np.uint8))[1].tobytes()


class PresignableObjects(MemoryObjects):
    """Objects in memory, to which a browser cannot really put anything."""

    def upload_url(self, uri: str, media_type: str, size: int, expires_s: int) -> str:
        return f"https://s3.test/{uri.partition('://')[2]}?type={media_type}&size={size}&for={expires_s}"


class Everybody(Access):
    """Whoever reaches the app is the one user."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)

    async def authenticate(
        self, authorization: str | None, *, host: str | None = None, origin: str | None = None
    ) -> Caller:
        return self._one_user


@contextmanager
def serving(client: GradcamClient, objects: PresignableObjects, **settings: Any) -> Iterator[TestClient]:
    """An API over a client."""
    used = Settings(uploads="s3://uploads", **settings)
    app = create_app(used, client=AsyncGradcamClient(client=client), access=Everybody(used), objects=objects)
    with TestClient(app) as http:
        yield http


@pytest.fixture
def eager() -> Iterator[TestClient]:
    """An API whose jobs run as they are submitted."""
    images = {"s3://in/red.png": RED}
    client = eager_client(images)
    objects = cast(MemoryObjects, client.calls._objects)
    with serving(client, PresignableObjects(objects.store, objects.images)) as http:
        yield http


@pytest.fixture
def waiting() -> Iterator[TestClient]:
    """An API whose jobs stay in the queue."""
    client = GradcamClient(ledger=MemoryLedger(), publish=RecordingPublisher())
    with serving(client, PresignableObjects(MemoryStore(), {})) as http:
        yield http
