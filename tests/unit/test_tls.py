"""What of a certificate and a key is refused, and how the operator is told."""

import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from bamboo.errors import StartError
from bamboo.tls import server_context
from tests.support.tls import Authority


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(certfile: Path, keyfile: Path, section: str = "server") -> str:
    with pytest.raises(StartError) as caught:
        server_context(certfile, keyfile, alpn=["http/1.1"], section=section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_pair_makes_a_context_for_a_server_of_today(good: Authority) -> None:
    context = server_context(good.certfile, good.keyfile, alpn=["http/1.1"])

    assert context.protocol == ssl.PROTOCOL_TLS_SERVER
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert ssl.OP_NO_RENEGOTIATION in context.options
    assert ssl.OP_NO_COMPRESSION in context.options


def test_a_key_may_stand_in_the_file_of_its_certificate(good: Authority, tmp_path: Path) -> None:
    both = written(tmp_path / "both.pem", good.keyfile.read_bytes() + good.certfile.read_bytes())

    server_context(both, both, alpn=["http/1.1"])


@pytest.mark.parametrize("section", ["server", "gateway"])
def test_a_file_that_cannot_be_read_is_told_by_its_key(good: Authority, tmp_path: Path, section: str) -> None:
    missing = tmp_path / "missing.pem"

    assert refusal(missing, good.keyfile, section) == (
        f"{section}.certfile: cannot read {missing}: No such file or directory"
    )
    assert refusal(good.certfile, missing, section) == (
        f"{section}.keyfile: cannot read {missing}: No such file or directory"
    )
    assert refusal(tmp_path, good.keyfile, section).startswith(f"{section}.certfile: cannot read")


def test_a_file_without_what_it_should_have_is_told_by_its_key(good: Authority, tmp_path: Path) -> None:
    empty = written(tmp_path / "empty.pem", b"")

    assert refusal(good.keyfile, good.keyfile) == f"server.certfile: {good.keyfile} has no certificate (PEM)"
    assert refusal(empty, good.keyfile) == f"server.certfile: {empty} has no certificate (PEM)"
    assert refusal(good.certfile, good.certfile) == f"server.keyfile: {good.certfile} has no private key (PEM)"


def test_a_key_of_another_certificate_is_told(good: Authority, tmp_path: Path) -> None:
    other = written(tmp_path / "other.key", trustme.CA().issue_cert("localhost").private_key_pem.bytes())

    assert refusal(good.certfile, other) == f"server.keyfile: {other} is not the key of {good.certfile}"


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_a_key_with_a_passphrase_is_told_and_nobody_is_asked(
    good: Authority, tmp_path: Path, form: PrivateFormat
) -> None:
    key = load_pem_private_key(good.keyfile.read_bytes(), None)
    locked = written(tmp_path / "locked.key", key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"x")))

    assert "needs a passphrase" in refusal(good.certfile, locked)


def test_a_broken_certificate_is_told(good: Authority, tmp_path: Path) -> None:
    lines = good.certfile.read_bytes().splitlines()
    broken = written(tmp_path / "broken.pem", b"\n".join([lines[0], b"AAAA", *lines[2:]]))

    assert refusal(broken, good.keyfile).startswith("server.certfile, server.keyfile: TLS cannot use them: ")
