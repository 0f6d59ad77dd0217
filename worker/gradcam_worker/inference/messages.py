"""The messages between a job process and the engine process: one dataclass each, over a Unix stream socket.

    frame = length of head (uint32), length of body (uint32), head (JSON), body (arrays)

The head is a list: the message's number in `MESSAGES`, then its fields. Pixels are not in messages, but in
memory that both processes map: see `pixel_pool`. Nothing is unpickled. Both processes run the same version of
this package: `Hello` and `Welcome` hold it.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from gradcam_worker.errors import InternalError
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import ClassIndex
from gradcam_worker.gradcam.network import NetworkFacts

LENGTHS = struct.Struct("<II")
MAX_HEAD_BYTES = 64 * 1024**2  # the labels of a network with a million classes
MAX_BODY_BYTES = 2**31  # the results of the largest batch, with room
ROW = TypeAdapter(NetworkRow)  # these three are JSON in fields of messages, since they are sent rarely
FACTS = TypeAdapter(NetworkFacts)
LABELS = TypeAdapter(ClassIndex)
DTYPES = {"float32": np.dtype(np.float32), "int32": np.dtype(np.int32)}  # of the arrays in a body
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}  # `dtype.name` takes 20 microseconds


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a job process. Its file descriptor, sent with it, is that of its pixel pool."""

    version: str
    pid: int
    pool_bytes: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The engine's answer to `Hello`."""

    version: str
    pid: int
    device: str
    on_gpu: bool
    max_batch: int  # of the settings; 0: measured
    not_ready: str | None  # why no job should be taken yet
    error: str | None = None  # why the connection is refused


@dataclass(frozen=True, slots=True)
class State:
    """What the engine reports about itself, regularly."""

    not_ready: str | None
    networks: int
    mean_batch_size: float


@dataclass(frozen=True, slots=True)
class Register:
    """The row of a network, by a key that later messages name it by."""

    key: str
    row: str  # JSON


@dataclass(frozen=True, slots=True)
class Load:
    """Load a registered network if it is not loaded."""

    request: int
    key: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The answer to `Load`."""

    request: int
    facts: str  # JSON of `NetworkFacts`
    labels: str  # JSON of `ClassIndex`


@dataclass(frozen=True, slots=True)
class Infer:
    """Explain one image, in a batch with those of other requests; or `images` in a batch of their own."""

    request: int
    key: str
    offset: int  # of the pixels in the pool
    images: int  # 0: one image, which may share a batch
    classes: tuple[Any, ...]  # ids or ranks; of `images`, also a tuple of these for each image
    method: tuple[Any, ...]  # the fields of `Method`, without the last ones where they have their defaults
    bulk: bool
    alone: bool  # nothing else may be at the device: this request may have ended an engine
    traceparent: str | None = None  # of the job's span, which the span of the batch links to

    @property
    def is_announced(self) -> bool:
        """Whether the engine expects it: the job process has announced it in its pool of pixels."""
        return not self.images


@dataclass(frozen=True, slots=True)
class Score:
    """Compute the scores of n images alone."""

    request: int
    key: str
    offset: int
    images: int
    bulk: bool
    alone: bool


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop a request, if the device does not compute it yet. It is answered in any case."""

    request: int


@dataclass(frozen=True, slots=True)
class Results:
    """The results of requests that shared a batch.

    Body: scores, class ids, heatmaps; outputs if any; features if any.
    """

    requests: tuple[int, ...]
    images: tuple[int, ...]  # of each request
    waited_s: tuple[float, ...]  # of each request
    computed_s: float
    batch_size: int
    layer: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # type and shape
    has_features: bool = False


@dataclass(frozen=True, slots=True)
class Scored:
    """The answer to `Score`. Body: the scores."""

    request: int
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    computed_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer to a request that failed."""

    request: int
    code: str  # of a GradcamError
    detail: str


Message = (
    Hello | Welcome | State | Register | Load | Loaded | Infer | Score | Cancel | Results | Scored | Failed
)
MESSAGES: tuple[type[Any], ...] = (
    Hello,
    Welcome,
    State,
    Register,
    Load,
    Loaded,
    Infer,
    Score,
    Cancel,
    Results,
    Scored,
    Failed,
)
_NUMBERS = {message: number for number, message in enumerate(MESSAGES)}
_FIELDS = {message: tuple(field.name for field in fields(message)) for message in MESSAGES}
_encode = json.JSONEncoder(separators=(",", ":")).encode


class BrokenMessage(InternalError):
    """What was received is no message. The connection cannot be used any more."""


def encode(message: Message, arrays: tuple[NDArray[Any], ...] = ()) -> list[Any]:
    """Encode a message as the buffers of one frame.

    Args:
        message: The message.
        arrays: Its body: contiguous arrays.

    Returns:
        Buffers to send one after the other.
    """
    kind = type(message)
    head = _encode([_NUMBERS[kind], *(getattr(message, name) for name in _FIELDS[kind])]).encode()
    size = sum(array.nbytes for array in arrays)
    bodies = [array.data.cast("B") for array in arrays if array.size]
    return [LENGTHS.pack(len(head), size) + head, *bodies]


def describe_arrays(arrays: tuple[NDArray[Any], ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Describe the arrays of a body, for the field `arrays`."""
    return tuple((DTYPE_NAMES[array.dtype], array.shape) for array in arrays)


def split_body(arrays: tuple[tuple[str, tuple[int, ...]], ...], body: memoryview) -> list[NDArray[Any]]:
    """Split the body of a message into its arrays, without copying them.

    Args:
        arrays: The field `arrays` of the message.
        body: The body.

    Raises:
        BrokenMessage: The body has another size than these arrays.
    """
    parts, start = [], 0
    for name, shape in arrays:
        dtype = DTYPES.get(name)
        if dtype is None or any(length < 0 for length in shape):
            message = f"An array of {name!r} {shape} was received: it must be one of {', '.join(DTYPES)}."
            raise BrokenMessage(message)
        end = start + dtype.itemsize * math.prod(shape)
        if end > len(body):
            message = f"A body of {len(body)} bytes was received: it must have at least {end}."
            raise BrokenMessage(message)
        parts.append(np.frombuffer(body[start:end], dtype).reshape(shape))
        start = end
    return parts


class Receiver:
    """Assembles messages from the pieces in which a stream socket receives them."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[Message, memoryview]]:
        """Add received bytes; yield each message that is complete, with its body.

        Raises:
            BrokenMessage: The bytes are no message.
        """
        received = self._received
        received += data
        start = 0
        try:
            while len(received) - start >= LENGTHS.size:
                head_size, body_size = LENGTHS.unpack_from(received, start)
                if head_size > MAX_HEAD_BYTES or body_size > MAX_BODY_BYTES:
                    message = (
                        f"A message of {head_size} and {body_size} bytes was announced: that is no message."
                    )
                    raise BrokenMessage(message)
                head_start = start + LENGTHS.size
                body_start = head_start + head_size
                end = body_start + body_size
                if len(received) < end:
                    break
                head = bytes(received[head_start:body_start])
                body = memoryview(bytes(received[body_start:end])) if body_size else memoryview(b"")
                start = end
                yield decode(head), body
        finally:
            del received[:start]


def decode(head: bytes) -> Message:
    """Decode the head of a message. Raises BrokenMessage."""
    try:
        number, *values = json.loads(head)
        message: Message = MESSAGES[number](*_to_tuple(values))
    except (ValueError, TypeError, IndexError, RecursionError) as error:
        text = f"The head {head[:80]!r} is no message."
        raise BrokenMessage(text) from error
    return message


def _to_tuple(values: list[Any]) -> tuple[Any, ...]:
    """A list of JSON, and those in it, as tuples."""
    return tuple([_to_tuple(value) if type(value) is list else value for value in values])
