"""Reads HTTP/1.1 with httptools, within a limit: httptools itself takes headers of any size."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024  # of the address and all headers of one request


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. A request whose head is too large is answered 400, and the connection ends."""

    _in_head = False
    _head_bytes = 0  # that are known to belong to the head
    _pending_bytes = (
        0  # that came while the head was read: of a header that is not whole, nothing else is known
    )

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        if self._in_head:
            self._pending_bytes += len(data)
            if self._pending_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The head of a request has at most {MAX_HEAD_BYTES} bytes.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Begin to count."""
        self._in_head, self._head_bytes, self._pending_bytes = True, 0, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count a part of the address."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop counting: the body has limits of its own."""
        self._in_head = False
        super().on_headers_complete()

    def _count(self, *parts: bytes) -> None:
        self._head_bytes += sum(map(len, parts))
        if self._head_bytes > MAX_HEAD_BYTES:
            message = "The head is too large."
            raise ValueError(message)  # within httptools, which reports it: the answer is 400
