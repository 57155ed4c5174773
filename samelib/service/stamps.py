"""Proof of work: signed challenges, each bound to one query and good once, and the stamps that answer them.

A challenge is a line of text, `BITS.EXPIRES.NONCE.QUERY.SIGNATURE`: the difficulty, milliseconds since 1970, 16 random
bytes and the digest of the query in hexadecimal, and the HMAC-SHA256 of all that. A stamp is the challenge, a dot and a
decimal number, chosen such that SHA-256 of the whole line begins with BITS zero bits. The service keeps nothing for a
challenge that it gave out; of stamps it remembers the nonces, until they expire.
(Hashcash, Back 2002; for model extraction Dziedzic et al. 2022, the paper's reference for its proof of work.)
"""

import hashlib
import itertools
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from itsdangerous import BadSignature, Signer
from torch import Tensor

_CHALLENGE = re.compile(r"([0-9]{1,3})\.([0-9]{1,16})\.([0-9a-f]{32})\.([0-9a-f]{64})\.[A-Za-z0-9_-]{43}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,20}", re.ASCII)
SMALLEST_SECRET = 16  # bytes
GRACE = 60_000  # milliseconds: how far the clocks of processes that share a file of spent stamps may differ


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
    """SHA-256 of one query, uint8 [C, H, W] or several [N, C, H, W], shape included."""
    return hashlib.sha256(repr(tuple(image.shape)).encode() + image.cpu().contiguous().numpy().tobytes()).digest()


def read_challenge(text: str) -> Challenge:
    """What a challenge says, whoever signed it: all that a client needs.

    Raises:
        StampError: malformed.
    """
    parts = _CHALLENGE.fullmatch(text)
    if not parts:
        raise StampError("malformed", "this is no challenge; send back the text that the service gave")
    bits, expires, nonce, query = parts.groups()
    return Challenge(int(bits), int(expires), bytes.fromhex(nonce), bytes.fromhex(query))


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
        most: how many stamps are remembered, about 100 bytes each.

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
        except sqlite3.Error as error:
            raise ValueError(
                f"{path} cannot hold the spent stamps ({error}); name a new file in a writable folder"
            ) from error

    def __len__(self) -> int:
        with self._lock:
            return self._db.execute("SELECT count(*) FROM spent").fetchone()[0]

    def holds(self, challenge: Challenge) -> bool:
        with self._lock:
            return bool(self._db.execute("SELECT 1 FROM spent WHERE nonce = ?", [challenge.nonce]).fetchone())

    def add(self, challenges: Sequence[Challenge], now: int) -> None:
        """Remembers all of them or, if one was spent before, none.

        Args:
            now: milliseconds since 1970; what expired `GRACE` before is forgotten.

        Raises:
            StampError: one is spent, is there twice, or expired while it waited: whether it was spent may be forgotten.
            SpentFull: there is no place for so many.
        """
        if any(challenge.expires <= now for challenge in challenges):
            raise StampError("expired", "this stamp expired while it waited; ask for a new challenge")
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("DELETE FROM spent WHERE expires <= ?", [now - GRACE])
            try:
                rows = [(challenge.nonce, challenge.expires) for challenge in challenges]
                self._db.executemany("INSERT INTO spent VALUES (?, ?)", rows)
            except sqlite3.IntegrityError as error:
                raise StampError("spent", "this stamp was spent before; ask for a new challenge") from error
            if self._db.execute("SELECT count(*) FROM spent").fetchone()[0] > self.most:
                raise SpentFull(f"{self.most:,} stamps are spent and not yet forgotten")

    def close(self) -> None:
        self._db.close()


class StampOffice:
    """Gives out challenges and takes stamps.

    Args:
        secret: the key of the signature, 16 bytes or more; whoever knows it can forge challenges.
        lifetime: seconds until a challenge expires; its stamp is remembered about as long.
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
        self._signer = Signer(secret, "samelib.challenge", key_derivation="hmac", digest_method=hashlib.sha256)
        self.lifetime, self._clock = lifetime, clock
        self.spent = SpentStamps() if spent is None else spent

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def issue(self, query: bytes, bits: int) -> str:
        """A new challenge of that difficulty for the query of that digest."""
        expires = self._now() + int(self.lifetime * 1000)
        return self._signer.sign(f"{bits}.{expires}.{secrets.token_hex(16)}.{query.hex()}").decode()

    def check(self, stamp: str, query: bytes) -> Challenge:
        """The challenge that a stamp answers, if it is good for this query; it is not spent by that.

        Raises:
            StampError: it is malformed, forged, expired, made for another query, not solved, or spent.
        """
        text, _, number = stamp.rpartition(".")
        challenge = read_challenge(text)
        if not _NUMBER.fullmatch(number):
            raise StampError("malformed", "this is no stamp; it is the challenge, a dot and a number")
        try:
            self._signer.unsign(text)
        except BadSignature as error:
            raise StampError("forged", "this service did not sign this challenge; ask for a new one") from error
        if challenge.expires <= self._now():
            raise StampError("expired", f"a challenge is good for {self.lifetime:g} seconds; ask for a new one")
        if challenge.query != query:
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
            SpentFull: too many are remembered.
        """
        self.spent.add(challenges, self._now())
