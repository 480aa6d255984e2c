"""Identities of server and devices, and the roster that says whose they are.

A fleet has an **authority**, best kept offline: it signs the roster, which lists the public keys of
the server and of every device. Each party has a directory of its own::

    identity.pem   Ed25519 private key (PKCS#8, perhaps with a passphrase), mode 0600
    agreement.pem  X25519 private key, likewise
    authority.pub  the authority's public key, the one thing that is trusted as it is
    roster.json    signed by the authority; the same for all

``fedq keys init`` makes three: ``authority/``, ``server/``, and ``public/`` with the last two
files, which every device needs beside keys of its own.

Secret keys are never printed, and no error shows one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedq.errors import ConfigError, FedqError

#: Environment variable with the passphrase of secret keys at rest.
PASSPHRASE = "FEDQ_KEY_PASSPHRASE"
IDENTITY, AGREEMENT, AUTHORITY, ROSTER = (
    "identity.pem",
    "agreement.pem",
    "authority.pub",
    "roster.json",
)
#: What a device agrees to at least, whatever its server says.
SMALLEST_SUM = 3
_ROSTER_DOMAIN = b"fedq roster 1\0"
_OTHERS = 0o077


@dataclass(frozen=True, repr=False)
class Identity:
    """The secret keys of the server or of a device.

    Attributes:
      signing: Ed25519: proves who speaks.
      agreement: X25519: others seal for it.
    """

    signing: Ed25519PrivateKey
    agreement: X25519PrivateKey

    @classmethod
    def generate(cls) -> Identity:
        """Return fresh keys."""
        return cls(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @property
    def public(self) -> PublicKeys:
        """The public halves."""
        return PublicKeys(
            self.signing.public_key().public_bytes_raw(),
            self.agreement.public_key().public_bytes_raw(),
        )


@dataclass(frozen=True)
class PublicKeys:
    """What everybody may know of a party: 32 bytes each.

    >>> keys = simulated(0).public
    >>> PublicKeys.parse(str(keys)) == keys
    True
    """

    signing: bytes
    agreement: bytes

    def __str__(self) -> str:
        return (self.signing + self.agreement).hex()

    @classmethod
    def parse(cls, text: str) -> PublicKeys:
        """Return the keys of 128 hexadecimal digits, as ``fedq keys device`` prints them."""
        try:
            raw = bytes.fromhex(text)
            Ed25519PublicKey.from_public_bytes(raw[:32])
        except ValueError:
            raw = b""
        if len(raw) != 64:
            raise ConfigError("public keys are the 128 hexadecimal digits of fedq keys device")
        return cls(raw[:32], raw[32:])


class Roster(Protocol):
    """Whose keys count."""

    @property
    def server(self) -> PublicKeys:
        """The server's public keys."""

    def device(self, client: int) -> PublicKeys | None:
        """Return a device's public keys, None if it is unknown or revoked."""


@dataclass(frozen=True)
class Credentials:
    """Who a party is to others, and whom it trusts.

    Attributes:
      identity: Its secret keys.
      roster: Whose keys count.
      smallest: It takes part in sums of at least so many clients.
    """

    identity: Identity
    roster: Roster
    smallest: int = SMALLEST_SUM

    @classmethod
    def load(cls, directory: Path, smallest: int = SMALLEST_SUM) -> Credentials:
        """Read a party's directory.

        Raises:
          ConfigError: If a file is missing or not its owner's alone, or the passphrase is wrong.
          FedqError: If the roster is not signed by the authority.
        """
        roster = SignedRoster.load(directory)
        return cls(read_identity(directory), roster, smallest)


# --- simulation --------------------------------------------------------------------------------


def simulated(seed: int, client: int | None = None) -> Identity:
    """Return the keys of a simulated client, or of the simulated server.

    They follow from the seed: a simulation runs the protocols of a fleet, and protects nothing.
    """
    name = f"fedq simulated identity/{seed}/{'server' if client is None else client}"
    signing, agreement = (hashlib.sha256(f"{name}/{key}".encode()).digest() for key in "sa")
    return Identity(
        Ed25519PrivateKey.from_private_bytes(signing),
        X25519PrivateKey.from_private_bytes(agreement),
    )


@lru_cache(maxsize=4096)
def _simulated_public(seed: int, client: int | None) -> PublicKeys:
    return simulated(seed, client).public


@dataclass(frozen=True)
class SimulatedRoster:
    """The public keys of all :func:`simulated` identities of a seed."""

    seed: int

    @property
    def server(self) -> PublicKeys:
        """The server's public keys."""
        return _simulated_public(self.seed, None)

    def device(self, client: int) -> PublicKeys | None:
        """Return a device's public keys."""
        return _simulated_public(self.seed, client)


# --- roster ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignedRoster:
    """A fleet's public keys, signed by its authority.

    Attributes:
      version: Grows with each change.
      server: The server's public keys.
      devices: By client number.
      revoked: Clients whose keys no longer count; a new key takes a number off this list.

    Example:
      >>> authority, server, device = (Identity.generate() for _ in range(3))
      >>> roster = SignedRoster(1, server.public).with_device(7, device.public)
      >>> signed = roster.signed(authority.signing)
      >>> SignedRoster.opened(signed, authority.public.signing).device(7) == device.public
      True
      >>> roster.without_device(7).device(7) is None
      True
    """

    version: int
    server: PublicKeys
    devices: Mapping[int, PublicKeys] = field(default_factory=dict)
    revoked: frozenset[int] = frozenset()

    def device(self, client: int) -> PublicKeys | None:
        """Return a device's public keys, None if it is unknown or revoked."""
        return None if client in self.revoked else self.devices.get(client)

    def with_device(self, client: int, keys: PublicKeys) -> SignedRoster:
        """Return the roster with a new device, or new keys of one."""
        if any(other == keys and number != client for number, other in self.devices.items()):
            raise ConfigError("another client has these keys; each device makes its own")
        return dataclasses.replace(
            self,
            version=self.version + 1,
            devices={**self.devices, client: keys},
            revoked=self.revoked - {client},
        )

    def without_device(self, client: int) -> SignedRoster:
        """Return the roster with a device's keys revoked."""
        if client not in self.devices:
            raise ConfigError(f"client {client} is not on the roster; see fedq keys list")
        return dataclasses.replace(self, version=self.version + 1, revoked=self.revoked | {client})

    def with_server(self, keys: PublicKeys) -> SignedRoster:
        """Return the roster with new keys of the server."""
        return dataclasses.replace(self, version=self.version + 1, server=keys)

    def signed(self, authority: Ed25519PrivateKey) -> bytes:
        """Return the file's content."""
        content = {
            "version": self.version,
            "server": str(self.server),
            "devices": {str(client): str(keys) for client, keys in sorted(self.devices.items())},
            "revoked": sorted(self.revoked),
        }
        text = json.dumps(content, indent=1)
        signature = authority.sign(_ROSTER_DOMAIN + text.encode()).hex()
        return json.dumps({"roster": text, "signature": signature}, indent=1).encode()

    @classmethod
    def opened(cls, data: bytes, authority: bytes) -> SignedRoster:
        """Return the roster of a file's content.

        Raises:
          FedqError: If it is not signed by the authority, or damaged.
        """
        try:
            outer = json.loads(data)
            text = outer["roster"].encode()
            key = Ed25519PublicKey.from_public_bytes(authority)
            key.verify(bytes.fromhex(outer["signature"]), _ROSTER_DOMAIN + text)
            content = json.loads(text)
            return cls(
                int(content["version"]),
                PublicKeys.parse(content["server"]),
                {int(c): PublicKeys.parse(keys) for c, keys in content["devices"].items()},
                frozenset(map(int, content["revoked"])),
            )
        except (InvalidSignature, ValueError, KeyError, TypeError, AttributeError):
            raise FedqError(
                f"{ROSTER} is damaged, or not signed by our authority; copy it anew"
            ) from None

    @classmethod
    def load(cls, directory: Path) -> SignedRoster:
        """Read the roster of a party's directory."""
        text = _read(directory / AUTHORITY)
        try:
            authority = bytes.fromhex(text.decode().strip())
        except ValueError:
            raise ConfigError(f"{directory / AUTHORITY} is damaged; copy it anew") from None
        return cls.opened(_read(directory / ROSTER), authority)


# --- files -------------------------------------------------------------------------------------


def write_identity(directory: Path, identity: Identity, *, replace: bool = False) -> None:
    """Write secret keys for their owner alone, under the passphrase of the environment if any.

    Raises:
      ConfigError: If there are some already and ``replace`` is not set.
    """
    passphrase = os.environ.get(PASSPHRASE, "").encode()
    encryption: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption()
    )
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, key in ((IDENTITY, identity.signing), (AGREEMENT, identity.agreement)):
        path = directory / name
        if path.exists() and not replace:
            raise ConfigError(f"{path} exists; remove it, or rotate the keys")
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
        write_private(path, pem)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file that only its owner may read, atomically."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_identity(directory: Path) -> Identity:
    """Read the secret keys of a party's directory.

    Raises:
      ConfigError: If one is missing, readable for others, or the passphrase is wrong.
    """
    signing, agreement = _private(directory / IDENTITY), _private(directory / AGREEMENT)
    if not isinstance(signing, Ed25519PrivateKey) or not isinstance(agreement, X25519PrivateKey):
        raise ConfigError(f"{directory} holds keys of another kind; make new ones")
    return Identity(signing, agreement)


def _private(path: Path) -> Any:
    data = _read(path)
    if path.stat().st_mode & _OTHERS:
        raise ConfigError(f"{path} can be read by others; chmod 600 it, or make new keys")
    passphrase = os.environ.get(PASSPHRASE, "").encode() or None
    try:
        return serialization.load_pem_private_key(data, passphrase)
    except (TypeError, ValueError):
        raise ConfigError(f"cannot open {path}: set {PASSPHRASE} to its passphrase") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); see fedq keys --help") from None


# --- the authority -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """The directory of a fleet's authority: what ``fedq keys`` works on.

    Example:
      >>> import tempfile
      >>> root = Path(tempfile.mkdtemp())
      >>> fleet = Fleet.init(root / "fleet")
      >>> fleet.add(7, make_device(root / "device"))
      >>> fleet.roster.device(7) == read_identity(root / "device").public
      True
    """

    directory: Path

    @classmethod
    def init(cls, directory: Path) -> Fleet:
        """Make the keys of an authority and of a server, and an empty roster.

        Raises:
          ConfigError: If the directory holds a fleet already.
        """
        fleet, authority, server = cls(directory), Identity.generate(), Identity.generate()
        write_identity(fleet._authority, authority)
        write_identity(fleet._server, server)
        for place in fleet._places:
            place.mkdir(parents=True, exist_ok=True)
            (place / AUTHORITY).write_text(authority.public.signing.hex() + "\n")
        fleet._publish(SignedRoster(1, server.public))
        return fleet

    @property
    def roster(self) -> SignedRoster:
        """The roster as it stands."""
        return SignedRoster.load(self._authority)

    def add(self, client: int, keys: PublicKeys) -> None:
        """Put a device on the roster, or give it new keys."""
        self._publish(self.roster.with_device(client, keys))

    def revoke(self, client: int) -> None:
        """Take a device off the roster."""
        self._publish(self.roster.without_device(client))

    def rotate_server(self) -> None:
        """Give the server new keys; devices trust them with the next roster that they get."""
        fresh = Identity.generate()
        roster = self.roster.with_server(fresh.public)
        write_identity(self._server, fresh, replace=True)
        self._publish(roster)

    @property
    def _authority(self) -> Path:
        return self.directory / "authority"

    @property
    def _server(self) -> Path:
        return self.directory / "server"

    @property
    def _places(self) -> tuple[Path, ...]:
        return self._authority, self._server, self.directory / "public"

    def _publish(self, roster: SignedRoster) -> None:
        data = roster.signed(read_identity(self._authority).signing)
        for place in self._places:
            write_private(place / ROSTER, data)
            (place / ROSTER).chmod(0o644)


def make_device(directory: Path) -> PublicKeys:
    """Make a device's keys where they stay; return what the authority needs of them.

    Raises:
      ConfigError: If there are keys already.
    """
    identity = Identity.generate()
    write_identity(directory, identity)
    return identity.public
