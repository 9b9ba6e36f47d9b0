"""The body of an HTTP response, decoded within a size limit."""

import zlib

from data_prep.pairs.addresses import FetchError

UNSUPPORTED_ENCODINGS = ("br", "zstd", "compress")


class Body:
    """Receives a body block by block and decodes it, holding at most the limit and one block."""

    def __init__(self, encoding: str, limit: int) -> None:
        self.content = bytearray()
        self.received = 0
        self._encoding, self._limit = encoding.strip().lower().removeprefix("x-"), limit
        self._stream: zlib._Decompress | None = None
        if self._encoding in UNSUPPORTED_ENCODINGS or "," in self._encoding:
            raise FetchError("http_status", f"200, but encoded as {encoding[:100]!r}, which was not requested")

    def feed(self, block: bytes) -> None:
        """Add the next block received."""
        self.received += len(block)
        self.content += self._decode(block) if self._encoding in ("gzip", "deflate") else block
        if max(self.received, len(self.content)) > self._limit:
            raise FetchError("too_large", f"more than {self._limit} bytes")

    def _decode(self, block: bytes) -> bytes:
        if self._stream is None:  # servers send "deflate" with and without a zlib header
            bits = 31 if self._encoding == "gzip" else 15 if block[0] & 15 == 8 else -15
            self._stream = zlib.decompressobj(bits)
        if self._stream.eof:
            return b""
        try:
            return self._stream.decompress(block, self._limit + 1 - len(self.content))
        except zlib.error as error:
            raise FetchError("http_status", f"200, but not encoded as {self._encoding}: {error}") from error

    def end(self) -> None:
        """Check that the body is complete."""
        if self._stream is not None and not self._stream.eof:
            raise FetchError("connect", f"the body ends before its {self._encoding} encoding does", transient=True)
