"""A certificate authority of our own, certificates for loopback from it, and HTTP clients that trust it."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import trio
import trustme

from tests.support.http_client import HttpConnection


class Authority:
    """Its certificate for localhost and 127.0.0.1 is in `certfile` and `keyfile`."""

    def __init__(self, directory: Path) -> None:
        self._authority = trustme.CA()
        certificate = self._authority.issue_cert("localhost", "127.0.0.1")
        self.certfile, self.keyfile = directory / "server.pem", directory / "server.key"
        self.certfile.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
        self.keyfile.write_bytes(certificate.private_key_pem.bytes())

    @property
    def files(self) -> dict[str, Any]:
        """As the configuration has them."""
        return {"certfile": self.certfile, "keyfile": self.keyfile}

    def client_context(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context


@asynccontextmanager
async def connect_tls(url: str, context: ssl.SSLContext) -> AsyncIterator[HttpConnection]:
    """A connection to `https://host:port`, its handshake done. The client is strict: a connection that is cut instead
    of being closed in TLS is Cut, or BrokenResourceError."""
    parts = urlsplit(url)
    assert (parts.scheme, parts.hostname is None, parts.port is None) == ("https", False, False), url
    host, port = str(parts.hostname), int(parts.port or 0)
    stream = trio.SSLStream(await trio.open_tcp_stream(host, port), context, server_hostname=host)
    try:
        await stream.do_handshake()
        # HttpConnection needs a stream only; its type is for those that look at the socket.
        yield HttpConnection(cast(trio.SocketStream, stream), parts.netloc)
    finally:
        await trio.aclose_forcefully(stream)
