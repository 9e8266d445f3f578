"""The certificate and key of a listener, as a TLS context. For both listeners."""

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bamboo.errors import StartError

_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_PRIVATE_KEY: Final = b"PRIVATE KEY-----"
_ENCRYPTED: Final = (b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED")


def server_context(certfile: Path, keyfile: Path, *, alpn: Sequence[str], section: str = "server") -> ssl.SSLContext:
    """A context that speaks TLS 1.2 and later with this certificate, and offers the protocols `alpn` only.

    The files are read now, and not again. `section` is that of the configuration which names them. Raises StartError,
    which names the key.
    """
    certificate, key = _read(certfile, f"{section}.certfile"), _read(keyfile, f"{section}.keyfile")
    if _CERTIFICATE not in certificate:
        raise StartError(f"{section}.certfile: {certfile} has no certificate (PEM)")
    if _PRIVATE_KEY not in key:
        raise StartError(f"{section}.keyfile: {keyfile} has no private key (PEM)")
    if any(mark in key for mark in _ENCRYPTED):
        raise StartError(f"{section}.keyfile: {keyfile} needs a passphrase, and nobody is here to be asked for one")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(list(alpn))
    try:
        context.load_cert_chain(certfile, keyfile)
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartError(f"{section}.keyfile: {keyfile} is not the key of {certfile}") from error
        raise StartError(f"{section}.certfile, {section}.keyfile: TLS cannot use them: {reason}") from error
    return context


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{key}: cannot read {path}: {error.strerror or error}") from error
