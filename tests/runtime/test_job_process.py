"""What a job process is made of: it is started as the supervisor starts it, and explains an image."""

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.inference.engine_server import EngineFacts, EngineServer
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.runtime import devices
from gradcam_worker.runtime.processes.supervisor import WORKER, plan_processes
from gradcam_worker.settings import Settings
from gradcam_worker.testing import TinyNetwork

WAIT_S = 60
# Resident, without the pages of libraries: those are shared, 40 to 55 MB, as large parts as the kernel likes.
MAX_OWN_KB = 105_000
# The backends and what comes with them; Arrow, which only shards need; databases, if a setting names one.
HEAVY = {"tensorflow", "keras", "jax", "torch", "h5py", "scipy", "pandas", "pyarrow", "sqlalchemy", "alembic"}
HEAVY |= {"onnxruntime", "ai_edge_litert"}


@contextmanager
def engine(path: Path) -> Iterator[None]:
    server = EngineServer(
        ModelCache(lambda _: TinyNetwork()), path, EngineFacts("cpu", on_gpu=False, max_batch=8)
    )
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join(WAIT_S)


@contextmanager
def job_process(settings: Settings, path: Path, log: Path) -> Iterator[int]:
    """Start a job process; yield its id once it takes jobs. Its imports are in its log."""
    device, *_ = devices.choose(settings)
    planned = plan_processes([device], settings)[-1]
    variables = {"GRADCAM_ENGINE_SOCKET": str(path), "PYTHONPROFILEIMPORTTIME": "1"}
    read_fd, write_fd = os.pipe()
    with log.open("wb") as output, os.fdopen(read_fd, "rb") as signs:
        process = subprocess.Popen(
            [*WORKER, str(write_fd)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[write_fd],
            env={**device.environment, **planned.variables, **variables},
        )
        os.close(write_fd)
        try:
            assert signs.read(1) == b"1", log.read_text()[-2000:]
            yield process.pid
        finally:
            process.terminate()
            process.communicate(timeout=WAIT_S)


def test_a_job_process_is_light_and_never_imports_a_backend(
    settings: Settings, photos: Path, tmp_path: Path
) -> None:
    path, log = tmp_path / "engine", tmp_path / "log"
    changes = {
        "job_processes": 2,
        "one_core": True,
        "devices": "cpu",
        "image_schemes": ("file",),
        "image_roots": (str(photos),),
        "output": f"file://{tmp_path}/results",
    }
    settings = settings.model_copy(update=changes)
    with engine(path), job_process(settings, path, log) as pid:
        client = GradcamClient(settings=settings)
        job_id = client.submit(
            image=f"file://{photos}/chelsea.jpg", network="efficientnet_lite0", target={"top_n": 2}
        )
        assert client.wait(job_id, WAIT_S).status == "succeeded"
        mapped = Path(f"/proc/{pid}/maps").read_text()
        state = Path(f"/proc/{pid}/status").read_text()
        cores = {
            frozenset(os.sched_getaffinity(int(one.name))) for one in Path(f"/proc/{pid}/task").iterdir()
        }
    assert any(len(one) == 1 for one in cores), "a loop may be choosing a core just now"
    lines = [line for line in log.read_text().splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert {"celery", "cv2", "gradcam_worker"} <= imported
    assert not imported & HEAVY
    assert not [name for name in ("tensorflow", "libarrow") if name in mapped]
    own_kb = sum(int(size) for size in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", state))
    assert 0 < own_kb < MAX_OWN_KB


def test_a_dataset_needs_arrow_only_when_a_file_is_read_or_written() -> None:
    program = "import sys, gradcam_worker.execution.handler; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([*WORKER[:2], "-c", program], check=False).returncode == 0
