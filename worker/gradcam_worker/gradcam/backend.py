"""Keras and its backend. All other modules import `keras` from here.

The backend is that of KERAS_BACKEND, or TensorFlow. `keras.json`, in the folder KERAS_HOME or ~/.keras, is
ignored: results must not depend on a file in a user's home. If a program has imported Keras before, its
configuration and backend stay.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

from gradcam_worker import extras
from gradcam_worker.errors import InvalidSettings

_is_first = "keras" not in sys.modules
if _is_first and not os.environ.get("KERAS_BACKEND"):
    os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is imported


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Suppress what TensorFlow writes to stderr while it loads, before its log level takes effect."""
    stderr, null_device = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null_device, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null_device)


# TensorFlow and Keras import these where they are installed: two fifths of the time that a command needs to
# start, for data and models that no command has. JAX as the backend needs some of them.
UNUSED = ("jax", "pandas", "scipy", "sklearn") if os.environ.get("KERAS_BACKEND") == "tensorflow" else ()

with (
    _silent_stderr(),
    extras.required("Loading a network"),
    extras.hidden_in_commands(*UNUSED),
    extras.without_garbage_collection(),
):
    try:
        import keras as keras  # noqa: PLC0414  # re-exported
    except (AttributeError, TypeError, ValueError) as error:  # keras.json, or KERAS_BACKEND
        _message = (
            f"Keras cannot be imported: {error} Correct or remove keras.json in the folder KERAS_HOME or "
            "~/.keras; KERAS_BACKEND must be tensorflow, jax or torch."
        )
        raise InvalidSettings(_message) from error


def _configure(floatx: str, epsilon: float, image_data_format: str, dtype_policy: object) -> None:
    keras.config.set_floatx(floatx)
    keras.config.set_epsilon(epsilon)
    keras.config.set_image_data_format(image_data_format)
    keras.config.set_dtype_policy(dtype_policy)


CONFIGURATION = ("float32", 1e-7, "channels_last", "float32")  # Keras's own defaults
if _is_first:
    _configure(*CONFIGURATION)


@contextmanager
def default_configuration() -> Iterator[None]:
    """Configure Keras as our networks need it, and restore the configuration of the program afterwards."""
    config = keras.config
    before = config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy()
    try:
        _configure(*CONFIGURATION)
        yield
    finally:
        _configure(*before)


def name() -> str:
    """The name of the backend: `tensorflow`, `jax` or `torch`."""
    return str(keras.backend.backend())


def version() -> str:
    """The name and version of the backend, as in `tensorflow 2.21.0`."""
    return f"{name()} {import_module(name()).__version__}"


def device_name() -> str:
    """The name of the device that networks run on: that of the first GPU, or `cpu`."""
    if name() == "jax":
        import jax

        device = jax.devices()[0]
        return "cpu" if device.platform == "cpu" else str(device.device_kind)
    if name() == "torch":
        import torch

        return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        return "cpu"
    return str(tf.config.experimental.get_device_details(devices[0]).get("device_name", "gpu"))


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32: a GPU multiplies float32 faster by rounding factors to ten bits.

    This affects all networks of the process; on a CPU nothing changes. By default TensorFlow allows it.

    Args:
        allowed: Whether it is allowed.
    """
    if name() == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if allowed else "highest")
    elif name() == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    else:
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(allowed)


def arithmetic(dtype: str) -> str:
    """The arithmetic of a model.

    Args:
        dtype: The type that it computes in.

    Returns:
        That type, or `tf32` where a GPU may use it for float32.
    """
    if dtype != "float32" or device_name() == "cpu":
        return dtype
    if name() == "jax":
        import jax

        allowed = jax.config.jax_default_matmul_precision not in {"highest", "float32"}
    elif name() == "torch":
        import torch

        allowed = torch.backends.cuda.matmul.allow_tf32
    else:
        import tensorflow as tf

        allowed = tf.config.experimental.tensor_float_32_execution_enabled()
    return "tf32" if allowed else dtype


_earlier_peak = {"bytes": 0}  # the largest one of TensorFlow that `reset_peak_memory` has reset


def peak_memory() -> int | None:
    """The peak of memory on the first GPU in bytes, since `reset_peak_memory`; None on a CPU."""
    if device_name() == "cpu":
        return None
    if name() == "jax":
        import jax

        return int(jax.devices()[0].memory_stats()["peak_bytes_in_use"])
    if name() == "torch":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import tensorflow as tf

    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])


def memory_kept() -> int:
    """The bytes of the first GPU that the allocator of this process keeps, in use or not; 0 on a CPU.

    TensorFlow's does not tell them, but gives nothing back: they are the largest peak.
    """
    if device_name() == "cpu":
        return 0
    if name() == "jax":
        import jax

        stats = jax.devices()[0].memory_stats()
        return max(int(stats.get(key, 0)) for key in ("bytes_in_use", "peak_bytes_in_use", "pool_bytes"))
    if name() == "torch":
        import torch

        return int(torch.cuda.memory_reserved())
    import tensorflow as tf

    info = tf.config.experimental.get_memory_info("GPU:0")
    return max(int(info["current"]), int(info["peak"]), _earlier_peak["bytes"])


def reset_peak_memory() -> None:
    """Reset `peak_memory`. With JAX this is impossible: its peak is that since the start of the process."""
    if device_name() == "cpu" or name() == "jax":
        return
    if name() == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        import tensorflow as tf

        _earlier_peak["bytes"] = memory_kept()
        tf.config.experimental.reset_memory_stats("GPU:0")


def set_intra_op_threads(count: int) -> None:
    """Set the number of threads of one operation on the CPU. With JAX this is impossible, and ignored.

    Args:
        count: Number of threads; 0 keeps the default.

    Raises:
        RuntimeError: TensorFlow has computed something already.
    """
    if not count:
        return
    if name() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(count)
    elif name() == "torch":
        import torch

        torch.set_num_threads(count)


def intra_op_threads() -> int:
    """The number of threads that `set_intra_op_threads` has set; 0: the default. Of TensorFlow alone."""
    if name() != "tensorflow":
        return 0
    import tensorflow as tf

    return int(tf.config.threading.get_intra_op_parallelism_threads())


def _allocate_gpu_memory_on_demand() -> None:
    """Let TensorFlow allocate a GPU's memory as needed. By default it takes all of it on first use."""
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        with suppress(RuntimeError):  # it is in use already
            tf.config.experimental.set_memory_growth(device, True)


if name() == "tensorflow":
    _allocate_gpu_memory_on_demand()
