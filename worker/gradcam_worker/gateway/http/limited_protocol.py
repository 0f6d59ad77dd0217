"""Reads HTTP/1.1 with httptools, within a limit: httptools itself takes headers of any size."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024  # after its first piece; as many of trailers, and of a chunk's extensions
PIECE_BYTES = 16 * 1024  # that are read at a time
TOO_LARGE = f"The head of a request has at most {MAX_HEAD_BYTES} bytes."


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. A request with too much that is no body is answered 400, and the connection ends.

    httptools says nothing while it collects a header, a trailer or an extension, however long: what comes
    until it has something to say is counted.
    """

    _is_silent = False
    _silent_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Read what has come, a piece at a time."""
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._is_silent = True
            super().data_received(piece)
            if self.transport.is_closing():
                return
            self._silent_bytes = self._silent_bytes + len(piece) if self._is_silent else 0
            if self._silent_bytes > MAX_HEAD_BYTES:
                self.logger.warning(TOO_LARGE)
                self.send_400_response(TOO_LARGE)
                return

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_silent = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head has been read."""
        self._is_silent = False
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """The size of a chunk has been read."""
        self._is_silent = False

    def on_body(self, body: bytes) -> None:
        """A part of the body has been read; it has limits of its own."""
        self._is_silent = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of the request has been read."""
        self._is_silent = False
        super().on_message_complete()
