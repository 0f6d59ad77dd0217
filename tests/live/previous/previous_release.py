"""The previous release at work: run with its package on PYTHONPATH, never with the one of this repository.

python previous_release.py supervise       its worker, with a small network in place of Keras's
python previous_release.py work FD         what its supervisor starts
python previous_release.py answer          what its client says: a line of JSON for each of standard input

A line names a command, the environment of its settings, and what is given to it.
"""

import base64
import json
import logging
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

MAX_BYTES = 1024 * 1024  # of a message's job


def previous(name: str) -> Any:
    """A module of the previous release, whose package was called `worker`."""
    return import_module(f"worker.{name}" if name else "worker")


def supervise() -> int:
    """What `gradcam worker` does."""
    settings = previous("settings").Settings.from_environment()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    command = (sys.executable, "-P", __file__, "work")
    return int(previous("supervisor").Supervisor(settings, command).run())


def work(ready_fd: int) -> int:
    """What `gradcam worker --unsupervised --ready-fd` does, without Keras."""
    door: Any = ModuleType("worker.gradcam.backend")
    door.name = door.version = lambda: "numpy"
    door.device_name = lambda: "cpu"
    door.peak_memory = door.reset_peak_memory = lambda: None
    door.set_intra_op_threads = lambda _: None
    sys.modules[door.__name__] = previous("gradcam").backend = door
    network = previous("testing").TinyNetwork
    settings = previous("settings").Settings.from_environment()
    return int(previous("process").run(settings, ready_fd=ready_fd, load=lambda row: network()))


def submit(jobs: list[Any]) -> list[str]:
    """Submit jobs; return their ids."""
    client = previous("client").GradcamClient()
    return [client.submit(job) for job in jobs]


def read(asked: dict[str, Any]) -> dict[str, Any]:
    """Messages (bytes in base64, and their queues) and ids, read as strictly as ever."""
    envelope, contract = previous("envelope"), previous("contract")
    jobs = []
    for item, queue in asked["messages"]:
        message = envelope.read(base64.b64decode(item), queue, MAX_BYTES)
        args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
        payload = kwargs or args[0]
        whole = set(payload) != {"id"}  # else the ledger has the rest
        jobs.append(json.loads(contract.Job.parse(payload).to_json()) if whole else payload)
    client = previous("client").GradcamClient()
    documents = {one: json.loads(client.status(one).to_json()) for one in asked["ids"]}
    return {"jobs": jobs, "documents": documents}


def answer() -> None:
    """Do what each line of standard input asks for, and say what came of it."""
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.update(asked["environment"])
        command = submit if asked["command"] == "submit" else read
        sys.stdout.write(json.dumps(command(asked["given"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["supervise"]:
            sys.exit(supervise())
        case ["work", ready_fd]:
            sys.exit(work(int(ready_fd)))
        case ["answer"]:
            answer()
