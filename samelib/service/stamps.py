"""Proof of work: signed challenges, each bound to one query and good once, and the stamps that answer them.

A challenge is a line of text: base64 of (version, bits, expiry, nonce, digest of the query) and of its HMAC-SHA256. A
stamp is the challenge, a dot and a number, chosen such that SHA-256 of the whole line begins with `bits` zero bits. The
service keeps nothing for a challenge that it gave out; of stamps it remembers the nonces, until they expire.
(Hashcash, Back 2002; for model extraction Dziedzic et al. 2022, the paper's reference for its proof of work.)
"""

import base64
import binascii
import hashlib
import hmac
import itertools
import re
import secrets
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

VERSION = 1
_PAYLOAD = struct.Struct(">BBQ16s32s")  # version, bits, expiry in milliseconds since 1970, nonce, digest of the query
_STAMP = re.compile(r"([A-Za-z0-9_-]{120})\.([0-9]{1,20})", re.ASCII)
STAMP_LENGTH = 141  # characters at most
SMALLEST_SECRET = 16  # bytes


class StampError(ValueError):
    """A stamp is refused; `reason` is one word for metrics and clients: malformed, forged, expired, mismatched, unsolved
    or spent."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class SpentFull(RuntimeError):
    """The record of spent stamps is full; none is forgotten before it expires, so no more can be taken for a while."""


class Challenge(NamedTuple):
    """What a challenge says.

    Attributes:
        bits: zero bits that the digest of its stamp must begin with.
        expires: milliseconds since 1970.
        nonce: 16 bytes, never given out twice.
        query: SHA-256 of the query (see `query_digest`).
    """

    bits: int
    expires: int
    nonce: bytes
    query: bytes


def query_digest(image: Tensor) -> bytes:
    """SHA-256 of one query, uint8 [C, H, W], its shape included."""
    return hashlib.sha256(repr(tuple(image.shape)).encode() + image.cpu().contiguous().numpy().tobytes()).digest()


def read_challenge(text: str) -> Challenge:
    """What a challenge says, whoever signed it: all that a client needs.

    Raises:
        StampError: malformed.
    """
    try:
        raw = base64.b64decode(text, altchars=b"-_", validate=True)
        version, bits, expires, nonce, query = _PAYLOAD.unpack(raw[: _PAYLOAD.size])
    except (binascii.Error, struct.error, ValueError) as error:
        raise StampError("malformed", "this is no challenge; send back the text that the service gave") from error
    if version != VERSION:
        raise StampError("malformed", f"a challenge of version {version}, this samelib knows {VERSION}")
    return Challenge(bits, expires, nonce, query)


def zero_bits(digest: bytes) -> int:
    """How many zero bits a digest begins with."""
    return 8 * len(digest) - int.from_bytes(digest, "big").bit_length()


def solve(challenge: str, most_bits: int = 32) -> tuple[str, int]:
    """The stamp of a challenge, and how many hashes it took: 2^bits on average, geometrically distributed.

    Raises:
        StampError: no challenge.
        ValueError: it asks for more than `most_bits`: a service may not put its clients to work for ever.
    """
    bits = read_challenge(challenge).bits
    if bits > most_bits:
        raise ValueError(f"the service asks for 2^{bits} hashes a query, the client gives 2^{most_bits} at most")
    start = hashlib.sha256(f"{challenge}.".encode())
    for number in itertools.count():
        attempt = start.copy()
        attempt.update(b"%d" % number)
        if zero_bits(attempt.digest()) >= bits:
            return f"{challenge}.{number}", number + 1


class SpentStamps:
    """The nonces of spent stamps, each until it expires, in an SQLite file that survives the process.

    Several processes of one machine may share the file (not one on a network drive: SQLite's locks do not reach there).

    Args:
        path: the file; None keeps them in memory, for a service whose secret dies with it.
        most: how many unexpired stamps are remembered, about 100 bytes each.

    Raises:
        ValueError: the file cannot be opened, or holds something else.
    """

    def __init__(self, path: Path | str | None = None, most: int = 1_000_000):
        self.most, self._lock = most, threading.Lock()
        try:
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, timeout=5)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")  # survives a killed process, if not always a power cut
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS spent (nonce BLOB PRIMARY KEY, expires INTEGER NOT NULL) WITHOUT ROWID"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS by_expiry ON spent (expires)")
            # In the file, not in the process: several processes may share it, and counting a million rows takes a while.
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS state (stamps INTEGER NOT NULL, forgotten_until INTEGER NOT NULL)"
            )
            self._db.execute(
                "INSERT INTO state SELECT (SELECT count(*) FROM spent), 0 WHERE NOT EXISTS (SELECT 1 FROM state)"
            )
        except sqlite3.Error as error:
            raise ValueError(
                f"{path} cannot hold the spent stamps ({error}); name a new file in a writable folder"
            ) from error

    def __len__(self) -> int:
        with self._lock:
            return self._db.execute("SELECT stamps FROM state").fetchone()[0]

    def holds(self, challenge: Challenge) -> bool:
        with self._lock:
            return bool(self._db.execute("SELECT 1 FROM spent WHERE nonce = ?", [challenge.nonce]).fetchone())

    def add(self, challenges: Sequence[Challenge], now: int) -> None:
        """Remembers all of them or, if one was spent before, none.

        Args:
            now: milliseconds since 1970; what expired before is forgotten.

        Raises:
            StampError: one is spent, is there twice, or expired while it waited: whether it was spent may be forgotten.
            SpentFull: there is no place for so many.
        """
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            count, forgotten_until = self._db.execute("SELECT * FROM state").fetchone()
            now = max(now, forgotten_until)
            if any(challenge.expires <= now for challenge in challenges):
                raise StampError("expired", "this stamp expired while it waited; ask for a new challenge")
            count += len(challenges) - self._db.execute("DELETE FROM spent WHERE expires <= ?", [now]).rowcount
            if count > self.most:
                raise SpentFull(f"{self.most:,} stamps are spent and not yet expired")
            try:
                rows = [(challenge.nonce, challenge.expires) for challenge in challenges]
                self._db.executemany("INSERT INTO spent VALUES (?, ?)", rows)
            except sqlite3.IntegrityError as error:
                raise StampError("spent", "this stamp was spent before; ask for a new challenge") from error
            self._db.execute("UPDATE state SET stamps = ?, forgotten_until = ?", [count, now])

    def close(self) -> None:
        self._db.close()


class StampOffice:
    """Gives out challenges and takes stamps.

    Args:
        secret: the key of the signature, 16 bytes or more; whoever knows it can forge challenges.
        lifetime: seconds until a challenge expires; its stamp is remembered no longer.
        spent: see SpentStamps.
        clock: seconds since 1970.

    Raises:
        ValueError: a short secret, or no lifetime.
    """

    def __init__(
        self,
        secret: bytes,
        lifetime: float = 300.0,
        spent: SpentStamps | None = None,
        clock: Callable[[], float] = time.time,
    ):
        if len(secret) < SMALLEST_SECRET:
            raise ValueError(f"the secret has {len(secret)} bytes, it needs {SMALLEST_SECRET} or more")
        if not 0 < lifetime < 86_400:
            raise ValueError(f"a challenge lives more than 0 seconds and less than a day, got {lifetime}")
        self._secret, self.lifetime, self._clock = secret, lifetime, clock
        self.spent = SpentStamps() if spent is None else spent

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _sign(self, payload: bytes) -> bytes:
        return hmac.digest(self._secret, payload, "sha256")

    def issue(self, query: bytes, bits: int) -> str:
        """A new challenge of that difficulty for the query of that digest."""
        expires = self._now() + int(self.lifetime * 1000)
        payload = _PAYLOAD.pack(VERSION, bits, expires, secrets.token_bytes(16), query)
        return base64.urlsafe_b64encode(payload + self._sign(payload)).decode()

    def check(self, stamp: str, query: bytes) -> Challenge:
        """The challenge that a stamp answers, if it is good for this query; it is not spent by that.

        Raises:
            StampError: it is malformed, forged, expired, made for another query, not solved, or spent.
        """
        found = _STAMP.fullmatch(stamp)
        if not found:
            raise StampError("malformed", "this is no stamp; it is the challenge, a dot and a number")
        challenge, raw = read_challenge(found[1]), base64.urlsafe_b64decode(found[1])
        if not hmac.compare_digest(self._sign(raw[: _PAYLOAD.size]), raw[_PAYLOAD.size :]):
            raise StampError("forged", "this service did not sign this challenge; ask for a new one")
        if challenge.expires <= self._now():
            raise StampError("expired", f"a challenge is good for {self.lifetime:g} seconds; ask for a new one")
        if not hmac.compare_digest(challenge.query, query):
            raise StampError("mismatched", "this stamp was made for another query; each query needs its own")
        if zero_bits(hashlib.sha256(stamp.encode()).digest()) < challenge.bits:
            raise StampError("unsolved", f"SHA-256 of a stamp must begin with {challenge.bits} zero bits")
        if self.spent.holds(challenge):
            raise StampError("spent", "this stamp was spent before; ask for a new challenge")
        return challenge

    def spend(self, challenges: Sequence[Challenge]) -> None:
        """Spends all of them or none.

        Raises:
            StampError: one was spent meanwhile, or expired.
            SpentFull: too many are spent and not yet expired.
        """
        self.spent.add(challenges, self._now())
