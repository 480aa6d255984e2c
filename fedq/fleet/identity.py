"""Who is who: a fleet's certificate authority, its server's certificate, a key per device.

Keys are ECDSA on P-256: a device's public key and signature go with each of its requests, and are
short. Private keys are written for their owner alone and never printed.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedq.errors import ConfigError, FedqError

CA_DAYS, SERVER_DAYS = 3650, 398
#: Clocks of devices may be behind when they first connect.
BACKDATED = datetime.timedelta(days=1)
#: Letters and digits that are not mistaken for each other; 24 of them are 118 bits.
_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"
_CODE_LENGTH = 24


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, PEM."""

    certificate: bytes
    key: bytes


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    temporary.replace(path)


def authority(name: str) -> Pair:
    """Return a new certificate authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedq fleet {name}"[:64])])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def server_certificate(ca: Pair, hosts: Iterable[str], days: float = SERVER_DAYS) -> Pair:
    """Return a new key and certificate for a server reached by these names and addresses.

    Args:
      ca: The authority that signs.
      hosts: DNS names and IP addresses, each a subject alternative name.
      days: Validity; negative gives one that has expired.
    """
    issuer = x509.load_pem_x509_certificate(ca.certificate)
    signer = serialization.load_pem_private_key(ca.key, password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedq superlink")])
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
    builder = (
        _builder(subject, issuer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    return _pair(builder.sign(signer, hashes.SHA256()), key)


def expires(certificate: bytes) -> datetime.datetime:
    """Return when a PEM certificate ends, UTC."""
    return _certificate(certificate).not_valid_after_utc


def hosts(certificate: bytes) -> list[str]:
    """Return the names and addresses that a server's certificate is for."""
    names = _certificate(certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return [str(name.value) for name in names.value]


def signed_by(certificate: bytes, ca: bytes) -> bool:
    """Return whether an authority's certificate signed another one."""
    try:
        _certificate(certificate).verify_directly_issued_by(_certificate(ca))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def sign(ca: Pair, data: bytes) -> bytes:
    """Return an authority's signature of something that is no certificate."""
    key = serialization.load_pem_private_key(ca.key, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def is_signed(ca: bytes, data: bytes, signature: bytes) -> bool:
    """Return whether the authority with this certificate signed something."""
    key = _certificate(ca).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def device_key() -> ec.EllipticCurvePrivateKey:
    """Return a new private key for a device."""
    return ec.generate_private_key(ec.SECP256R1())


def public_line(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key's public half as one OpenSSH line."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def public_pem(line: bytes) -> bytes:
    """Return an OpenSSH public key as PEM, which is how Flower names a node."""
    try:
        key = serialization.load_ssh_public_key(line)
    except ValueError as error:
        raise ConfigError(f"not an OpenSSH public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError("a device's key must be ECDSA: ssh-keygen -t ecdsa")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as Flower reads it; only for a file of mode 0600."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def load_openssh(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key in a file.

    Raises:
      FedqError: If it is not there, is readable by others, or is no such key.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise FedqError(f"{path} can be read by others; run chmod 600 {path}")
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise FedqError(f"no device key: {error}; join again with fedq fleet join") from None
    except ValueError:
        raise FedqError(f"{path} is not a private key; join again with fedq fleet join") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FedqError(f"{path} is not an ECDSA key; join again with fedq fleet join")
    return key


def enrolment_code() -> str:
    """Return a new code that opens one bundle.

    >>> len(enrolment_code().split("-"))
    4
    """
    letters = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_LENGTH))
    return "-".join(letters[at : at + 6] for at in range(0, _CODE_LENGTH, 6))


def sealed(key: ec.EllipticCurvePrivateKey, code: str) -> bytes:
    """Return a private key encrypted with an enrolment code (PKCS 8, AES-256)."""
    return key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(code.strip().encode())
    )


def unsealed(data: bytes, code: str) -> ec.EllipticCurvePrivateKey:
    """Return what :func:`sealed` was given.

    Raises:
      ConfigError: On another code.
    """
    try:
        key = serialization.load_pem_private_key(data, password=code.strip().encode())
    except (ValueError, TypeError):
        raise ConfigError(
            "the enrolment code does not open this bundle; fedq fleet rotate DEVICE makes new ones"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("the bundle holds no ECDSA key")
    return key


def _certificate(data: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise FedqError(f"not a PEM certificate: {error}") from None


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - BACKDATED)
        .not_valid_after(end)
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
