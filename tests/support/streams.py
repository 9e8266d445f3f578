"""A ClientStream and its client, on a pair of real sockets within the process: plain, or through TLS."""

import trio

from bamboo.gateway.stream import ClientStream
from bamboo.tls import server_context
from tests.support.tls import Authority

Client = trio.SocketStream | trio.SSLStream[trio.SocketStream]


async def sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    """The server's end, and the client's."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        server = await listener.accept()
    return server, client


async def plain_pair(write_timeout_s: float = 5) -> tuple[ClientStream, trio.SocketStream]:
    """Our end, and the client's."""
    server, client = await sockets()
    return ClientStream(server, write_timeout_s=write_timeout_s), client


def tls_stream(server: trio.SocketStream, authority: Authority, write_timeout_s: float = 5) -> ClientStream:
    """Before its handshake."""
    context = server_context(authority.certfile, authority.keyfile, alpn=["http/1.1"])
    return ClientStream(server, write_timeout_s=write_timeout_s, tls=context)


async def tls_pair(
    authority: Authority, write_timeout_s: float = 5
) -> tuple[ClientStream, trio.SSLStream[trio.SocketStream]]:
    """Our end, and the client's, behind the handshake."""
    server, inner = await sockets()
    stream = tls_stream(server, authority, write_timeout_s)
    client = trio.SSLStream(inner, authority.client_context(), server_hostname="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.handshake)
        nursery.start_soon(client.do_handshake)
    return stream, client


async def read_all(client: Client) -> bytes:
    """To the end of the connection; of a TLS connection it has to be said properly."""
    pieces = []
    while data := await client.receive_some(65536):
        pieces.append(data)
    return b"".join(pieces)
