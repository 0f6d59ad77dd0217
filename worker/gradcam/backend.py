"""Keras and the backend under it, imported once and quietly: every other module takes `keras` from here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

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
    import keras as keras  # noqa: PLC0414  # handed on


def name() -> str:
    """`tensorflow`, `jax` or `torch`: what KERAS_BACKEND or Keras's own configuration file says."""
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
