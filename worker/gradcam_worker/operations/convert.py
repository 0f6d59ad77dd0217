"""`gradcam convert`: makes a `.keras` file of another format, in a child process.

The child is limited in time and memory, and ends with its parent. Its answer is one JSON document, in a file.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradcam_worker import extras
from gradcam_worker.errors import InternalError, MissingExtra, NetworkIncompatible
from gradcam_worker.operations.terminal import console
from gradcam_worker.resilience.budget import limit_memory
from gradcam_worker.runtime import parent_watch
from gradcam_worker.text.visible import abridged, visible

TIMEOUT_S = 900  # a large network takes minutes on a small machine
GRACE_S = 2  # a conversion has nothing to put in order
BASE_BYTES = 6 * 2**30  # of memory: what TensorFlow and the libraries need
PER_BYTE = 16  # bytes of memory for a byte of the file: its arrays as several libraries hold them
LOG_CHARACTERS = 600  # the end of what the child wrote
SPREAD = 1e-3  # of the range of the outputs: if they differ by less between images, a check shows little
OUTPUT, RESULT, LOG = "model.keras", "result.json", "log.txt"


@dataclass(frozen=True)
class Request:
    """What to convert, and how."""

    source: Path
    output: Path
    input_size: tuple[int, int] | None = None
    tolerance: float = 1e-4
    timeout_s: float = TIMEOUT_S
    memory_bytes: int = 0  # 0: by the size of the file
    force: bool = False  # replace an existing file
    imports: tuple[str, ...] = ()  # modules that define layers of the model


class NeedsConsent(Exception):
    """Something in the file could run code. The message is the rest of a sentence that begins with it."""


def convert(request: Request, *, allow_code: bool) -> dict[str, Any]:
    """Convert a file. The new one appears when it is complete and checked.

    Args:
        request: What to convert.
        allow_code: Whether code in the file may run.

    Returns:
        The fields of `gradcam.conversion.convert.Converted`.

    Raises:
        NeedsConsent: Something in it could run code, and that is not allowed.
        NetworkIncompatible: It cannot be converted, or the new model computes something else.
        MissingExtra: It needs an extra that is not installed.
    """
    request.output.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk as the result, so that it can be moved in one step.
    with tempfile.TemporaryDirectory(prefix=".gradcam-convert-", dir=request.output.parent) as temporary:
        folder = Path(temporary)
        answer = _run_child(request, folder, allow_code=allow_code)
        if "consent" in answer:
            raise NeedsConsent(answer["consent"])
        if "missing_extra" in answer:
            raise MissingExtra(answer["missing_extra"])
        if "refused" in answer:
            message = f"{request.source} {answer['refused']}."
            raise NetworkIncompatible(message)
        _move(folder / OUTPUT, request.output, force=request.force)
    return dict(answer["converted"])


def _run_child(request: Request, folder: Path, *, allow_code: bool) -> dict[str, Any]:
    """Run the child. Raises NetworkIncompatible if it ends without an answer."""
    limit = request.memory_bytes or BASE_BYTES + PER_BYTE * _size(request.source)
    order = {
        "path": str(request.source.absolute()),
        "folder": str(folder),
        "input_size": request.input_size,
        "tolerance": request.tolerance,
        "allow_code": allow_code,
        "imports": request.imports,
        "memory_bytes": limit,
    }
    environment = {
        "CUDA_VISIBLE_DEVICES": "",  # a GPU may be at work, and rounds in another way
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # -P: a folder in the working directory must not be imported instead of this package.
    command = [sys.executable, "-P", "-m", "gradcam_worker.operations.convert", json.dumps(order)]
    log = folder / LOG
    process = parent_watch.spawn(command, log=log, environment=environment, grace_s=GRACE_S)
    try:
        code = process.wait(request.timeout_s)
    except subprocess.TimeoutExpired:
        message = (
            f"{request.source} was not converted within {request.timeout_s:g} s: --timeout-s sets the limit."
        )
        raise NetworkIncompatible(message) from None
    finally:
        parent_watch.stop(process)
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((folder / RESULT).read_bytes()))
    raise NetworkIncompatible(_describe_crash(request.source, code, limit, log))


def _describe_crash(source: Path, code: int, limit: int, log: Path) -> str:
    number = code - 128
    how = f"by {signal.Signals(number).name}" if number in {*signal.Signals} else f"with exit code {code}"
    tail = log.read_text(errors="replace")[-LOG_CHARACTERS:].strip()
    output = f" It ended with: {visible(' '.join(tail.split()))}" if tail else ""
    return (
        f"{source} was not converted: the process that did it was ended {how}. Its memory was limited to "
        f"{limit / 2**30:.1f} GiB (--memory-gib).{output}"
    )


def _size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def _move(new: Path, output: Path, *, force: bool) -> None:
    """Let the new file appear under its name in one step. Raises NetworkIncompatible if there is one."""
    if force:
        new.replace(output)
        return
    try:
        output.hardlink_to(new)  # unlike a rename, it never replaces a file
    except FileExistsError:
        message = f"{output} exists already: --force replaces it."
        raise NetworkIncompatible(message) from None
    except OSError:  # a disk without links
        new.rename(output)


def registry_lines(converted: dict[str, Any], output: Path) -> list[str]:
    """The lines to paste into the registry.

    Args:
        converted: From `convert`.
        output: The new file.

    Returns:
        A table of TOML.
    """
    height, width = converted["input_size"] or (0, 0)
    channels = converted["channels"]
    photos = converted.get("photos")
    if photos:
        preprocessing = _inline(photos["preprocessing"])
    elif converted["rescales"]:
        preprocessing = '"none"  # its first layers rescale their input'
    elif channels == 1:
        preprocessing = '{ scale = 1.0, offset = 0.0, channels = "grey" }  # scale, offset: as it was trained'
    else:
        preprocessing = '"..."  # what was done to pixels in training: caffe, tf, torch, lite, unit, none'
    name = "".join(char if char.isalnum() and char.isascii() else "_" for char in output.stem) or "network"
    return [
        f"[networks.{name}]",
        f"model = {json.dumps(output.name)}",
        f'sha256 = "{converted["sha256"]}"',
        f"preprocessing = {preprocessing}",
        f"input_size = [{height}, {width}]",
        *([f"sizing = {_inline(photos['sizing'])}"] if photos else []),
        *([f"imports = {json.dumps(converted['imports'])}"] if converted.get("imports") else []),
    ]


def _inline(table: dict[str, Any]) -> str:
    """A table of TOML in one line."""
    return f"{{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in table.items())} }}"


def show(converted: dict[str, Any], request: Request) -> None:
    """Print what was written, and the lines for the registry."""

    def say(line: str) -> None:
        console.out.print(console.plain(line), soft_wrap=True)

    say(f"{request.output}: made of {request.source} ({converted['source']}), {converted['rebuilt']}.")
    if converted["passed_over"]:
        console.err.print(
            console.plain(f"Not layer by layer: {converted['passed_over']}", "dim"), soft_wrap=True
        )
    left_out = converted["left_out"]
    without = f", without pixels from {' and '.join(left_out)}, where rounding decides" if left_out else ""
    say(
        f"Old and new model agree to {converted['difference']:.1e} of the range of their outputs on "
        f"{converted['images']} images (limit {request.tolerance:g}){without}."
    )
    if converted["spread"] < SPREAD:
        warning = "Its outputs are the same for all of these images, so this shows little: is it trained?"
        console.err.print(console.plain(warning, "yellow"), soft_wrap=True)
    if converted["problem"]:
        console.err.print(console.plain(f"It cannot be explained: {converted['problem']}", "yellow"))
    else:
        rows, columns = converted["map_size"]
        layer, classes = converted["layer"], converted["classes"]
        say(f"Explained at the layer {layer} ({rows} x {columns}), {classes} classes.")
    say("")
    for line in registry_lines(converted, request.output):
        say(line)


def _answer(order: dict[str, Any]) -> dict[str, Any]:
    """What the child does. Returns the answer."""
    from gradcam_worker.gradcam.conversion import formats
    from gradcam_worker.gradcam.files.model_file import Refused

    path, folder = Path(order["path"]), Path(order["folder"])
    try:
        form = formats.recognise(path)
        # Read when TensorFlow is imported: what `tf.keras` is in `order["imports"]`.
        os.environ["TF_USE_LEGACY_KERAS"] = "0" if formats.is_of_keras_3(path, form) else "1"
        reason = formats.code_in(path, form)
        if reason and not order["allow_code"]:
            return {"consent": reason}
        from gradcam_worker.gradcam.conversion.convert import convert as convert_file

        size = order["input_size"]
        converted = convert_file(
            path,
            folder / OUTPUT,
            input_size=(size[0], size[1]) if size else None,
            tolerance=order["tolerance"],
            allow_code=order["allow_code"],
            imports=order["imports"],
        )
        return {"converted": asdict(converted)}
    except Refused as error:
        return {"refused": str(error)}
    except MissingExtra as error:
        return {"missing_extra": str(error)}
    except OSError as error:
        return {"refused": f"cannot be converted: {error}"}
    except Exception as error:  # noqa: BLE001  # the cause stands at the end of a long text
        return {"refused": f"cannot be converted: {abridged(str(InternalError.of(error)))}"}


def _main() -> int:
    order = json.loads(sys.argv[1])
    extras.run_as_command()
    limit_memory(order["memory_bytes"])
    answer = json.dumps(_answer(order))
    partial = Path(order["folder"]) / "answer"
    partial.write_text(answer, encoding="utf-8")
    partial.replace(Path(order["folder"]) / RESULT)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
