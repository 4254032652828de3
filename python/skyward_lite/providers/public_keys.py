"""Public keys in OpenSSH's one-line format: which text is a key for `ssh`, and which key it is.

Texts are bytes. A byte that means nothing to OpenSSH (a form feed, a lone carriage return, 0x85) must mean nothing
here, while to Python's text functions each of these ends a line or separates words.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from pathlib import Path

from .. import _core

TYPES = frozenset(
    {
        *("ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
        *("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"),
    }
)
"""Types of the public keys that are supported."""

_CERTIFICATES = {f"{name.removesuffix('@openssh.com')}-cert-v01@openssh.com": name for name in TYPES}
"""The type of a certificate: the type of the key that it is for."""
_RSA_NAMES = frozenset({"ssh-rsa", "rsa-sha2-256", "rsa-sha2-512"})
"""Names that a line may have for an RSA key, whose blob has the name "ssh-rsa"."""
_CURVES = {
    "nistp256": (
        2**256 - 2**224 + 2**192 + 2**96 - 1,
        0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
    ),
    "nistp384": (
        2**384 - 2**128 - 2**96 + 2**32 - 1,
        0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF,
    ),
    "nistp521": (
        2**521 - 1,
        0x51953EB9618E1C9A1F929A21A0B68540EEA2DA725B99B315F3B8B489918EF109E156193951EC7E937B1652C0BD3BB1BF073573DF883D2C34F1EF451FD46B503F00,
    ),
}
"""The curves y² = x³ - 3x + b modulo p of FIPS 186-4: p and b."""
_RSA_BITS = range(1024, 16385)
"""Bits of the moduli that OpenSSH reads."""

_WORDS = re.compile(rb"[ \t]*([^ \t]+)[ \t]+([^ \t]+)")
_SPACE = b" \t\n\v\f\r"
"""The white space that C's isspace() makes OpenSSH skip inside base64."""


@dataclasses.dataclass(frozen=True)
class PublicKey:
    """A line that OpenSSH takes for a public key."""

    type: str
    blob: bytes

    @property
    def usable(self) -> bool:
        """Whether keys of this type are supported."""
        return self.type in TYPES

    @property
    def line(self) -> str:
        """The key in one line, without a comment."""
        return f"{self.type} {base64.b64encode(self.blob).decode()}"

    @property
    def plain(self) -> PublicKey:
        """The key that this certificate is for; this key itself if it is no certificate."""
        kind = _CERTIFICATES.get(self.type)
        if kind is None:
            return self
        # A certificate's fields: its type, a nonce, the key's own fields, and more.
        fields = _fields(self.blob, 2 + _count(kind))
        return (fields and _make(kind, fields[2:])) or self

    @property
    def rsa_bits(self) -> int | None:
        """The length of an RSA key's modulus; None for other keys."""
        fields = _fields(self.blob) if self.type == "ssh-rsa" else None
        return None if fields is None else int.from_bytes(fields[2], "big").bit_length()


def lines(data: bytes) -> list[bytes]:
    """Return the lines as OpenSSH's C code sees them: only a newline ends a line, and a NUL hides the rest of it."""
    return [line.partition(b"\0")[0] for line in data.split(b"\n")]


def words(line: bytes, count: int) -> list[bytes]:
    """Return the first `count` words and then the rest of a line; spaces and tabs separate words, and nothing else."""
    return re.split(rb"[ \t]+", line.lstrip(b" \t"), maxsplit=count)


def read(text: bytes) -> PublicKey | None:
    """Return the key that a text begins with, as OpenSSH's `sshkey_read` does; None if that would not accept it.

    An RSA key is returned in its shortest encoding, so that equal keys have equal blobs.
    """
    match = _WORDS.match(text)
    blob = None if match is None else _decode(match[2])
    if match is None or blob is None:
        return None
    fields = _fields(blob, 1)
    name = match[1].decode("ascii", "replace")
    kind = "ssh-rsa" if name in _RSA_NAMES else name
    if not fields or fields[0] != kind.encode():
        return None
    if kind not in TYPES:
        return PublicKey(kind, blob)
    fields = _fields(blob)
    return None if fields is None else _make(kind, fields[1:])


def in_file(file: str) -> str | None:
    """Return the first public key in a file of one-line keys; None if it has none, or is a private key's file."""
    try:
        data = Path(file).read_bytes()
    except OSError:
        return None
    for line in lines(data):
        if line.startswith(b"-----BEGIN"):
            break  # a private key
        if line and not line.startswith(b"#") and (key := read(line)) is not None:
            return key.line if key.usable else None
    return None


def of_private_file(file: str) -> str | None:
    """Return the public key in a private key's file in OpenSSH's format, which does not encrypt this part of it."""
    try:
        data = Path(file).read_bytes()
    except OSError:
        return None
    line = _core.public_half(data)
    key = None if line is None else read(line.encode())
    return key.line if key is not None and key.usable else None


def _make(kind: str, fields: list[bytes]) -> PublicKey | None:
    """Return the key of a supported type with these fields after its type; None if no key has such fields."""
    if len(fields) != _count(kind):
        return None
    if kind == "ssh-rsa":
        # A number's first bit is its sign, and OpenSSH refuses negative ones.
        if any(number[:1] >= b"\x80" for number in fields):
            return None
        fields = [number.lstrip(b"\0") for number in fields]
        if int.from_bytes(fields[1], "big").bit_length() not in _RSA_BITS:
            return None
        fields = [b"\0" + number if number[:1] >= b"\x80" else number for number in fields]
    elif "ecdsa" in kind:
        curve = kind.removesuffix("@openssh.com").rpartition("-")[2]
        if fields[0] != curve.encode() or not _is_point(curve, fields[1]):
            return None
    elif len(fields[0]) != 32:
        return None
    if kind.startswith("sk-") and b"\0" in fields[-1][:-1]:
        return None  # the application's name is a C string
    whole = [kind.encode(), *fields]
    return PublicKey(kind, b"".join(len(field).to_bytes(4, "big") + field for field in whole))


def _is_point(curve: str, data: bytes) -> bool:
    """Return whether OpenSSH takes the bytes for a public point: uncompressed, on the curve, not small."""
    p, b = _CURVES[curve]
    size = (p.bit_length() + 7) // 8
    if len(data) != 1 + 2 * size or data[:1] != b"\4":
        return False
    x, y = int.from_bytes(data[1 : 1 + size], "big"), int.from_bytes(data[1 + size :], "big")
    small = min(x.bit_length(), y.bit_length()) <= p.bit_length() // 2
    return not small and max(x, y) < p and (y * y - (x * x * x - 3 * x + b)) % p == 0


def _count(kind: str) -> int:
    """Return how many fields a key of a supported type has after its type."""
    return (1 if "ed25519" in kind else 2) + kind.startswith("sk-")


def _fields(blob: bytes, most: int | None = None) -> list[bytes] | None:
    """Return the length-prefixed fields of a blob, the first `most` of them; None if the blob ends within a field."""
    fields: list[bytes] = []
    while blob and len(fields) != most:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length:
            return None
        fields.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return fields


def _decode(text: bytes) -> bytes | None:
    """Decode base64 as C's b64_pton does: white space is skipped, padding and unused bits must be exact."""
    text = text.translate(None, _SPACE)
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data if base64.b64encode(data) == text else None
