"""Certificates and keys: what verifies, what does not, and who may read what."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from pathlib import Path

import pytest

from fedq.errors import ConfigError, FedqError
from fedq.fleet import identity


def handshake(ca: bytes, pair: identity.Pair, name: str, folder: Path) -> str | None:
    """The reason for which a client that trusts ``ca`` refuses the server, None if it does not."""
    folder.mkdir()
    (folder / "crt").write_bytes(pair.certificate)
    (folder / "key").write_bytes(pair.key)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "crt", folder / "key")
    client = ssl.create_default_context(cadata=ca.decode())
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(far, server_side=True):
                pass
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    near.settimeout(10)
    try:
        with client.wrap_socket(near, server_hostname=name):
            return None
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        near.close()
        thread.join(10)


def test_a_server_is_who_its_certificate_names(tmp_path: Path) -> None:
    ca, other = identity.authority("shelf"), identity.authority("shelf")
    pair = identity.server_certificate(ca, ["pi.example", "127.0.0.1", "pi.example"])
    assert identity.hosts(pair.certificate) == ["pi.example", "127.0.0.1"]
    assert identity.signed_by(pair.certificate, ca.certificate)
    assert not identity.signed_by(pair.certificate, other.certificate)
    assert handshake(ca.certificate, pair, "pi.example", tmp_path / "a") is None
    assert handshake(ca.certificate, pair, "127.0.0.1", tmp_path / "b") is None
    assert "mismatch" in str(handshake(ca.certificate, pair, "evil.example", tmp_path / "c"))
    assert handshake(other.certificate, pair, "pi.example", tmp_path / "d") is not None


def test_an_old_certificate_has_expired(tmp_path: Path) -> None:
    ca = identity.authority("shelf")
    pair = identity.server_certificate(ca, ["localhost"], days=-1)
    assert identity.expires(pair.certificate) < datetime.datetime.now(datetime.UTC)
    assert "expired" in str(handshake(ca.certificate, pair, "localhost", tmp_path / "a"))


def test_a_sealed_key_opens_with_its_code_alone() -> None:
    key, code = identity.device_key(), identity.enrolment_code()
    sealed = identity.sealed(key, code)
    assert code.encode() not in sealed
    assert b"ENCRYPTED" in sealed
    again = identity.unsealed(sealed, f" {code}\n")
    assert identity.public_line(again) == identity.public_line(key)
    with pytest.raises(ConfigError, match="code does not open"):
        identity.unsealed(sealed, identity.enrolment_code())


def test_codes_differ() -> None:
    assert len({identity.enrolment_code() for _ in range(200)}) == 200


def test_a_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("of before, with another mode")
    path.chmod(0o644)
    key = identity.device_key()
    identity.write_private(path, identity.openssh(key))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["key"]
    assert identity.public_line(identity.load_openssh(path)) == identity.public_line(key)
    path.chmod(0o640)
    with pytest.raises(FedqError, match="chmod 600"):
        identity.load_openssh(path)
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(FedqError, match="not a private key"):
        identity.load_openssh(path)
    with pytest.raises(FedqError, match="join again"):
        identity.load_openssh(tmp_path / "absent")


@pytest.mark.parametrize("line", [b"", b"ssh-rsa AAAA", b"ecdsa-sha2-nistp256 AAAA x"])
def test_what_is_no_public_key(line: bytes) -> None:
    with pytest.raises(ConfigError):
        identity.public_pem(line)
