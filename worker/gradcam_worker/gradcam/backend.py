"""Keras and the backend under it, imported once and quietly: every other module takes `keras` from here.

`keras.json`, in the folder KERAS_HOME or ~/.keras, says nothing here: what is computed must not depend on a
file in somebody's home. The backend is what KERAS_BACKEND says, else TensorFlow. A program that has imported
Keras before keeps what it has set, and its backend.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

from gradcam_worker.errors import InvalidSettings

_is_first = "keras" not in sys.modules
if _is_first and not os.environ.get("KERAS_BACKEND"):
    os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is imported


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """TensorFlow writes notes to stderr while it loads, before its own log level holds."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


with _silent_stderr():
    try:
        import keras as keras  # noqa: PLC0414  # handed on
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
def configured() -> Iterator[None]:
    """Keras as our own networks are built, whatever a program that uses this library has set for its own."""
    config = keras.config
    before = config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy()
    try:
        _configure(*CONFIGURATION)
        yield
    finally:
        _configure(*before)


def name() -> str:
    """`tensorflow`, `jax` or `torch`: what KERAS_BACKEND says, or what Keras was imported with before."""
    return str(keras.backend.backend())


def version() -> str:
    """The backend and its version, as in `tensorflow 2.21.0`."""
    return f"{name()} {import_module(name()).__version__}"


def device_name() -> str:
    """What the networks run on: the first GPU's name, or `cpu`."""
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
    """Whether a GPU may round the factors of float32 products to TF32, ten bits, as is faster.

    It holds for the whole process and every network in it, and does nothing on a CPU. TensorFlow allows it
    unless it is told otherwise.
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
    """What a model of this type computes in: that, or `tf32` where a GPU may take it for float32."""
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


def peak_memory() -> int | None:
    """Bytes on the first GPU at the worst moment since `reset_peak_memory`; None on a CPU."""
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


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew. JAX cannot: there it counts since the process began."""
    if device_name() == "cpu" or name() == "jax":
        return
    if name() == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats("GPU:0")


def set_intra_op_threads(count: int) -> None:
    """How many threads one operation may use on the CPU; 0 leaves it as it is. JAX cannot be told.

    Raises RuntimeError where TensorFlow has computed something already.
    """
    if not count:
        return
    if name() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(count)
    elif name() == "torch":
        import torch

        torch.set_num_threads(count)


def _let_memory_grow() -> None:
    """TensorFlow takes all of a GPU's memory at once, unless it is told before it uses it first."""
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        with suppress(RuntimeError):  # somebody has used it already
            tf.config.experimental.set_memory_growth(device, True)


if name() == "tensorflow":
    _let_memory_grow()
