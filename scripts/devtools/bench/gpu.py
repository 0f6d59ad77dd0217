"""`engine` and `service` on this machine's accelerator, with the backend that KERAS_BACKEND names: `service`
alone with JAX and PyTorch.

Where there is no accelerator, or the backend does not see it, this says so. Exit code 2 then; else 1 where
either of the two misses what is required.
"""

import io
import json
import sys
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from typing import Any

from gradcam_worker.gradcam import backend

PARTS = {"tensorflow": ("engine", "service")}  # the engine's bench compares with TensorFlow's own graph
OTHERS = ("service",)
NONE = 2  # exit code


def main(*, quick: bool, as_json: bool) -> int:
    """Run both benches, each as it would run by itself."""
    device, version = backend.device_name(), backend.version()
    if device == "cpu":
        message = f"There is no accelerator here that {version} can use: nothing was measured."
        print(json.dumps({"device": None, "backend": version, "why": message}) if as_json else message)
        return NONE
    found: dict[str, Any] = {"device": device, "backend": version}
    codes: list[int] = []
    for name in PARTS.get(backend.name(), OTHERS):
        if not as_json:
            print(f"\n{name} on {device}, {version}\n")
        text = io.StringIO()
        with redirect_stdout(text) if as_json else nullcontext():
            codes.append(import_module(f"devtools.bench.{name}").main(quick=quick, as_json=as_json))
        if as_json:
            found[name] = json.loads(text.getvalue())
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
    return max(codes)
