"""What native code writes to standard error becomes events of the log.

Libraries in C write to file descriptor 2 by themselves: libjpeg and libpng about a damaged image, in words
that may come from its file; the driver of a GPU; the C library, before it aborts the process. Here a pipe
takes the descriptor's place. A thread reads it, and so does each thread that has decoded an image, before it
goes on (`attributed`): so lines that were written while images of one job alone were decoded name that job.
Only the libraries that write are watched: JPEGs are decoded by another one, but for some rare ones.

The supervisor makes the pipe and keeps its reading end: it logs what a process wrote last before it died.
Nobody who writes is ever blocked: what does not fit into the pipe, 64 KiB, is lost.
"""

import ctypes
import errno
import faulthandler
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

from gradcam_worker.observability.logs import context_fields, log_context
from gradcam_worker.text.log_events import EventLogger
from gradcam_worker.text.visible import visible

log = EventLogger("gradcam")

STANDARD_ERROR = 2
CHUNK_BYTES = 65_536
MAX_LINES = 20  # logged of what is read at once about images: a damaged one may cause thousands
MAX_OTHER_LINES = 1000  # of anything else: at a crash there is a line for each frame of each thread
MAX_LINE_LENGTH = 1000  # characters
PARTIAL_LINE_S = 0.1  # after which a line without an end is logged as it is
JOIN_TIMEOUT_S = 1.0
WORDS = {"image/jpeg": b"JPEG", "image/png": b"libpng"}  # in what libjpeg and libpng write


class Pipe(NamedTuple):
    """The two ends of a pipe."""

    read_fd: int
    write_fd: int


class _Decoding(NamedTuple):
    """An image that is being decoded."""

    media_type: str
    fields: Mapping[str, object]  # of the log context of its thread


class _Reader:
    """Reads the pipe of this process and logs what it finds.

    A line is taken out of the pipe when it is logged, and not before: where the process is killed meanwhile,
    its supervisor finds it there.
    """

    def __init__(self, read_fd: int) -> None:
        self._read_fd, self._copy_fds = read_fd, os.pipe()
        self._tee: Any = getattr(ctypes.CDLL(None, use_errno=True), "tee", None)  # of Linux: copies a pipe
        self._ended = self._closed = False  # nobody can write any more; nothing may be read any more
        self._decoding: list[_Decoding] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, name="native-output", daemon=True)
        self._thread.start()

    @contextmanager
    def attributed(self, media_type: str) -> Iterator[None]:
        decoding = _Decoding(media_type, context_fields())
        with self._lock:
            self._decoding.append(decoding)
        try:
            yield
        finally:
            with self._lock:
                self._log_lines(whole=len(self._decoding) == 1)
                self._decoding.remove(decoding)

    def close(self) -> None:
        """Log what is left. The writing end must be closed."""
        self._thread.join(JOIN_TIMEOUT_S)  # longer only if another process has the writing end, too
        with self._lock:
            self._log_lines(whole=True)
            self._closed = True
        for fd in self._copy_fds:
            os.close(fd)

    def _read(self) -> None:
        while not (self._ended or self._closed):
            select.select([self._read_fd], [], [])
            with self._lock:
                unfinished = self._log_lines(whole=False)
            if unfinished:
                time.sleep(PARTIAL_LINE_S)
                with self._lock:
                    self._log_lines(whole=not self._closed and self._copy() == unfinished)

    def _log_lines(self, *, whole: bool) -> bytes:
        """Log what is there; `whole`: also a line that has no end yet. Returns that of such a line."""
        while not self._closed and (data := self._copy()):
            lines, end, unfinished = data.rpartition(b"\n")
            if whole or not self._tee or len(data) == CHUNK_BYTES:
                lines, end, unfinished = data, b"", b""
            if lines:
                _log(lines.split(b"\n"), self._decoding)
            if self._tee:
                os.read(self._read_fd, len(lines + end))
            if unfinished:
                return unfinished
        return b""

    def _copy(self) -> bytes:
        """What is in the pipe, which stays there if the system can copy a pipe."""
        try:
            if not self._tee:
                data = os.read(self._read_fd, CHUNK_BYTES)
                self._ended = not data
                return data
            size = self._tee(self._read_fd, self._copy_fds[1], CHUNK_BYTES, 0)
            if size < 0 and ctypes.get_errno() not in {errno.EAGAIN, errno.EINTR}:
                self._tee = None  # a sandbox may forbid it
                return self._copy()
            self._ended = not size
            return os.read(self._copy_fds[0], size) if size > 0 else b""
        except BlockingIOError:
            return b""


_reader: _Reader | None = None  # a process has one standard error


def make_pipe() -> Pipe:
    """Make a pipe for a process, that blocks neither its reader nor its writers."""
    pipe = Pipe(*os.pipe())
    for fd in pipe:
        os.set_blocking(fd, False)
    return pipe


@contextmanager
def capture(pipe: Sequence[str]) -> Iterator[None]:
    """Let what native code of this process writes to standard error become events, within the block.

    The log, and whatever else Python code writes to standard error, goes where it went before. A crash writes
    the stacks of all threads into the pipe.

    Args:
        pipe: The file descriptors of a `Pipe`, made by the supervisor and closed here; empty: nothing is
            captured.
    """
    global _reader  # noqa: PLW0603  # a process has one standard error
    if not pipe:
        yield
        return
    read_fd, write_fd = map(int, pipe)
    before, original_fd = sys.stderr, os.dup(STANDARD_ERROR)
    with os.fdopen(original_fd, "w", buffering=1, errors="backslashreplace") as original:
        before.flush()
        os.dup2(write_fd, STANDARD_ERROR)
        os.close(write_fd)
        os.set_inheritable(read_fd, False)
        _redirect(before, original)
        _reader = reader = _Reader(read_fd)
        had_faulthandler = faulthandler.is_enabled()
        faulthandler.enable(STANDARD_ERROR)
        try:
            yield
        finally:
            if not had_faulthandler:
                faulthandler.disable()
            os.dup2(original_fd, STANDARD_ERROR)
            _reader = None
            reader.close()
            _redirect(original, before)
    os.close(read_fd)


@contextmanager
def attributed(media_type: str) -> Iterator[None]:
    """Let what native code writes within the block be logged with the fields of this thread's job.

    Where other threads are in such a block at the time, for other jobs, all their jobs are named.

    Args:
        media_type: Of the image that is decoded within the block.
    """
    if _reader is None:
        yield
        return
    with _reader.attributed(media_type):
        yield


def log_last_output(read_fd: int, **fields: object) -> None:
    """Log what a process that has ended wrote last, if it did not log that itself.

    Args:
        read_fd: The reading end of its pipe.
        **fields: Added to each event.
    """
    data = b""
    while len(data) <= CHUNK_BYTES:
        try:
            more = os.read(read_fd, CHUNK_BYTES)
        except BlockingIOError:  # a process that it has started has the writing end
            break
        if not more:
            break
        data += more
    _log_lines(data.split(b"\n"), MAX_OTHER_LINES, fields)


def _log(lines: list[bytes], decoding: Sequence[_Decoding]) -> None:
    """Log lines that were written while these images were being decoded."""
    if not decoding:
        _log_lines(lines, MAX_OTHER_LINES, {"pid": os.getpid()})
        return
    suspects = [one for one in decoding if WORDS.get(one.media_type, b"") in lines[0]]
    ids = {str(one.fields.get("job_id", "")): one.fields for one in suspects or decoding}
    if len(ids) == 1:
        (fields,) = ids.values()
        with log_context(**fields):
            _log_lines(lines, MAX_LINES, {})
    else:
        _log_lines(lines, MAX_LINES, {"job_ids": sorted(filter(None, ids))})


def _log_lines(lines: list[bytes], limit: int, fields: Mapping[str, object]) -> None:
    texts = [text for line in lines if (text := line.decode(errors="backslashreplace").rstrip())]
    for text in texts[:limit]:
        log.warning("native_output", text=visible(text[:MAX_LINE_LENGTH]), **fields)
    if len(texts) > limit:
        log.warning("native_output_cut", lines=len(texts) - limit, **fields)


def _redirect(before: TextIO, after: TextIO) -> None:
    """Let Python code that writes to one stream write to another one."""
    sys.stderr = after
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)
