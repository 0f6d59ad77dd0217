"""The app of the HTTP API with the ledger in memory, and a client for it."""

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.gateway.app import create_app
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, RecordingPublisher, eager_client


@pytest.fixture
def eager() -> Iterator[TestClient]:
    """An API whose jobs run as they are submitted."""
    picture = cv2.imencode(".png", np.full((32, 32, 3), (0, 0, 255), np.uint8))[1].tobytes()
    client = AsyncGradcamClient(client=eager_client({"s3://in/red.png": picture}))
    with TestClient(create_app(Settings(), client=client)) as http:
        yield http


@pytest.fixture
def waiting() -> Iterator[TestClient]:
    """An API whose jobs stay in the queue."""
    client = AsyncGradcamClient(client=GradcamClient(ledger=MemoryLedger(), publish=RecordingPublisher()))
    with TestClient(create_app(Settings(), client=client)) as http:
        yield http
