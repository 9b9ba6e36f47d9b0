"""The body of an HTTP response: content decoding that cannot be blown up."""

import zlib

from data_prep.pairs.addresses import FetchError

UNREAD_ENCODINGS = ("br", "zstd", "compress")


class Body:
    """A body as it comes in, decoded without holding more than the limit and a block."""

    def __init__(self, encoding: str, limit: int) -> None:
        self.content = bytearray()
        self.received = 0
        self._encoding, self._limit = encoding.strip().lower().removeprefix("x-"), limit
        self._stream: zlib._Decompress | None = None
        if self._encoding in UNREAD_ENCODINGS or "," in self._encoding:
            raise FetchError("http_status", f"200, but encoded as {encoding[:100]!r}, which was not asked for")

    def feed(self, block: bytes) -> None:
        """Take what was received next."""
        self.received += len(block)
        self.content += self._decode(block) if self._encoding in ("gzip", "deflate") else block
        if max(self.received, len(self.content)) > self._limit:
            raise FetchError("too_large", f"more than {self._limit} bytes")

    def _decode(self, block: bytes) -> bytes:
        if self._stream is None:  # what servers call deflate comes with and without the header of zlib
            bits = 31 if self._encoding == "gzip" else 15 if block[0] & 15 == 8 else -15
            self._stream = zlib.decompressobj(bits)
        if self._stream.eof:
            return b""
        try:
            return self._stream.decompress(block, self._limit + 1 - len(self.content))
        except zlib.error as error:
            raise FetchError("http_status", f"200, but not encoded as {self._encoding}: {error}") from error

    def end(self) -> None:
        """Check that the body is whole."""
        if self._stream is not None and not self._stream.eof:
            raise FetchError("connect", f"the body ends before its {self._encoding} encoding does", transient=True)
