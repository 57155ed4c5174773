"""The accounts of a service, in a file that survives a restart: what each won in its bets, and which are banned."""

import hashlib
import hmac
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samelib.evidence import SKETCH, Wealth

STREAMS = ("strangeness", "likeness")
VERSION = 1  # of the tables below
SMALLEST_SECRET = 16  # bytes
REPEATS = 256  # the latest queries of an account, among which a repeat is recognised
MARK = 8  # bytes that stand for a query there

_COLUMNS = {
    "digest": "BLOB NOT NULL UNIQUE",
    "queries": "INTEGER NOT NULL",
    "strangeness_count": "INTEGER NOT NULL",
    "strangeness_log_bets": "REAL NOT NULL",
    "likeness_count": "INTEGER NOT NULL",
    "likeness_log_bets": "REAL NOT NULL",
    "log_wealth": "REAL NOT NULL",
    "banned": "REAL",
    "marks": "BLOB NOT NULL",
    "memory": "BLOB NOT NULL",
}
_TABLES = (
    "CREATE TABLE about_accounts (version INTEGER NOT NULL, secret BLOB NOT NULL)",
    f"CREATE TABLE accounts ({', '.join(f'{name} {kind}' for name, kind in _COLUMNS.items())})",
    "CREATE INDEX by_wealth ON accounts (log_wealth) WHERE banned IS NULL",
)
# An update, where INSERT OR REPLACE would write the whole memory again: SQLite skips pages that stay as they are.
_KEEP = f"""INSERT INTO accounts VALUES ({", ".join("?" * len(_COLUMNS))})
ON CONFLICT (digest) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in list(_COLUMNS)[1:])}"""


class AccountsFull(RuntimeError):
    """There is no place for a new account: none is forgotten that is banned, or asks at this moment."""


@dataclass
class Account:
    """What is remembered of one account.

    Attributes:
        digest: keyed hash of its name, 32 bytes.
        queries: how many were judged, repeats not counted.
        wealth: of each stream of evidence.
        log_wealth: of all streams together.
        banned: since when, in seconds since 1970; None: it is not.
        marks: of its latest queries, MARK bytes each.
        memory: int32 [m, SKETCH]: a random sample of the sketches of its queries (reservoir sampling).
    """

    digest: bytes
    queries: int = 0
    wealth: dict[str, Wealth] = field(default_factory=lambda: {stream: Wealth() for stream in STREAMS})
    log_wealth: float = 0.0
    banned: float | None = None
    marks: bytes = b""
    memory: np.ndarray = field(default_factory=lambda: np.empty((0, SKETCH), np.int32))

    @property
    def label(self) -> str:
        """The beginning of its hash: what an operator calls it."""
        return self.digest.hex()[:12]

    def count(self, query: bytes) -> bool:
        """Counts one more query, unless it repeats one of the latest: was it counted?"""
        mark = hashlib.sha256(query).digest()[:MARK]
        if mark in self.marks:
            return False
        self.marks = (self.marks + mark)[-MARK * REPEATS :]
        self.queries += 1
        return True

    def remember(self, sketch: np.ndarray, most: int) -> None:
        """Takes the sketch int32 [SKETCH] of the query that was just counted into a sample of `most`, as chance has it:
        a chance that the hash and the number of the query decide."""
        if len(self.memory) < most:
            self.memory = np.concatenate([self.memory, sketch[None]])
            return
        draw = hashlib.sha256(self.digest + self.queries.to_bytes(8)).digest()
        slot = int.from_bytes(draw[:8]) % self.queries
        if slot < len(self.memory):
            self.memory[slot] = sketch

    def ban(self, now: float) -> None:
        """From now on; what its queries looked like is needed no more."""
        self.banned, self.marks, self.memory = now, b"", self.memory[:0]

    def as_row(self) -> tuple:
        bets = [number for stream in STREAMS for number in (self.wealth[stream].count, self.wealth[stream].log_bets)]
        return (self.digest, self.queries, *bets, self.log_wealth, self.banned, self.marks, self.memory.tobytes())

    @classmethod
    def of_row(cls, row: tuple) -> "Account":
        digest, queries, *bets, log_wealth, banned, marks, memory = row
        wealth = {stream: Wealth(*bets[2 * i : 2 * i + 2]) for i, stream in enumerate(STREAMS)}
        memory = np.frombuffer(memory, np.int32).reshape(-1, SKETCH).copy()
        return cls(digest, queries, wealth, log_wealth, banned, marks, memory)


class AccountBook:
    """The accounts of one model's service, in an SQLite file that survives the process.

    Names are hashed with the secret (HMAC-SHA256) before anything is stored. The file may be that of the spent stamps,
    and several processes of one machine may share it (not on a network drive: SQLite's locks do not reach there).

    At most `most` accounts are remembered, up to 70 kB each. Beyond, the one with the least wealth is forgotten, and
    starts with 1 when it comes back: what is lost is the least evidence there is. One that is banned or asks at the
    moment is never forgotten. The bound on false bans then holds for each time that an account starts, and who can
    have accounts for nothing can have evidence forgotten: let `most` be above the number of keys that you give out.

    Args:
        path: the file; None keeps them in memory.
        secret: of the hashes, 16 bytes or more. Without it a file can be listed and bans lifted, but nobody judged;
            accounts in memory have one that dies with them.
        most: how many accounts are remembered.
        clock: seconds since 1970.

    Attributes:
        bans: how many accounts were banned through this object.

    Raises:
        ValueError: a short secret, place for no account, or a file that cannot be opened, holds something else, is of
            another version, or was made with another secret.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        secret: bytes | None = None,
        most: int = 10_000,
        clock: Callable[[], float] = time.time,
    ):
        if secret is not None and len(secret) < SMALLEST_SECRET:
            raise ValueError(f"the secret has {len(secret)} bytes, it needs {SMALLEST_SECRET} or more")
        if most < 1:
            raise ValueError(f"a book of accounts has place for one or more, got {most}")
        self.path, self.most, self.clock, self.bans = path, most, clock, 0
        self._secret = secrets.token_bytes(32) if path is None and secret is None else secret
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, timeout=5)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")  # survives a killed process, if not always a power cut
            with self._transaction():
                self._open()
        except sqlite3.Error as error:
            raise ValueError(f"{path} cannot hold accounts ({error}); name a new file in a writable folder") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def _open(self) -> None:
        check = self._secret and hmac.digest(self._secret, b"samelib.accounts", "sha256")
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'about_accounts'").fetchone():
            if check is None:
                raise ValueError(f"{self.path} holds no accounts; name the file that samelib serve --accounts made")
            for table in _TABLES:
                self._db.execute(table)
            self._db.execute("INSERT INTO about_accounts VALUES (?, ?)", [VERSION, check])
        (version,) = self._db.execute("SELECT version FROM about_accounts").fetchone()
        if version != VERSION:
            words = f"{self.path} holds accounts of version {version}, this samelib reads version {VERSION}"
            raise ValueError(f"{words}; use the samelib that made it, or a new file, which knows of no bans")
        (made_with,) = self._db.execute("SELECT secret FROM about_accounts").fetchone()
        if check not in (None, made_with):
            words = f"the accounts in {self.path} were hashed with another secret, and none of them would be found"
            raise ValueError(f"{words}; give that one, or name a new file, which knows of no bans")

    def digest(self, name: str) -> bytes:
        """The keyed hash, 32 bytes, under which the account of that name is kept.

        Raises:
            ValueError: a file that was opened without its secret.
        """
        if self._secret is None:
            raise ValueError("to judge accounts takes the secret of their hashes; pass secret=...")
        return hmac.digest(self._secret, b"samelib.account:" + name.encode(), "sha256")

    @contextmanager
    def changing(self, names: Iterable[str]) -> Iterator[dict[str, Account]]:
        """The accounts of these names, new ones among them: what the block does to them is kept when it ends, all of it
        or, where it raises, nothing; no other process comes between.

        Raises:
            AccountsFull: all others are banned, and there are more than `most`.
        """
        digests = {name: self.digest(name) for name in names}
        with self._transaction():
            accounts = {name: self._read(digest) for name, digest in digests.items()}
            free = [account for account in accounts.values() if account.banned is None]
            yield accounts
            self._db.executemany(_KEEP, [account.as_row() for account in accounts.values()])
            self._forget(list(digests.values()))
        self.bans += sum(account.banned is not None for account in free)

    def _read(self, digest: bytes) -> Account:
        row = self._db.execute("SELECT * FROM accounts WHERE digest = ?", [digest]).fetchone()
        return Account.of_row(row) if row else Account(digest)

    def _forget(self, asking: list[bytes]) -> None:
        """Makes room by accounts other than those that ask."""
        excess = self._db.execute("SELECT count(*) FROM accounts").fetchone()[0] - self.most
        if excess <= 0:
            return
        others = f"banned IS NULL AND digest NOT IN ({', '.join('?' * len(asking))})"
        poorest = f"SELECT rowid FROM accounts WHERE {others} ORDER BY log_wealth LIMIT ?"
        gone = self._db.execute(f"DELETE FROM accounts WHERE rowid IN ({poorest})", [*asking, excess]).rowcount
        if gone < excess:
            raise AccountsFull(f"{self.most:,} accounts are remembered, and all of them are banned or ask just now")

    def find_banned(self, name: str) -> Account | None:
        """The account of that name if it is banned."""
        query = "SELECT * FROM accounts WHERE digest = ? AND banned IS NOT NULL"
        with self._lock:
            row = self._db.execute(query, [self.digest(name)]).fetchone()
        return row and Account.of_row(row)

    def richest(self, most: int) -> list[float]:
        """The logarithms of the wealth of the accounts nearest to a ban, the largest first."""
        query = "SELECT log_wealth FROM accounts WHERE banned IS NULL ORDER BY log_wealth DESC LIMIT ?"
        with self._lock:
            return [log_wealth for (log_wealth,) in self._db.execute(query, [most])]

    def entries(self) -> list[Account]:
        """All accounts, without marks and memory: banned ones first, then by wealth."""
        columns = ", ".join(list(_COLUMNS)[:-2])
        order = "banned IS NULL, banned DESC, log_wealth DESC"
        with self._lock:
            rows = self._db.execute(f"SELECT {columns}, x'', x'' FROM accounts ORDER BY {order}").fetchall()
        return [Account.of_row(row) for row in rows]

    def lift(self, prefix: str) -> Account:
        """Ends the ban of the account whose hash begins so: it is forgotten, and starts anew with wealth 1.

        Raises:
            ValueError: no account begins so, several do, or the one that does is not banned.
        """
        found = [account for account in self.entries() if account.digest.hex().startswith(prefix.lower())]
        if len(found) != 1:
            which = f"{len(found):,} accounts begin" if found else "no account begins"
            raise ValueError(f"{which} with {prefix!r}; give the digits of one, as samelib accounts lists them")
        if found[0].banned is None:
            raise ValueError(f"account {found[0].label} is not banned")
        with self._transaction():
            self._db.execute("DELETE FROM accounts WHERE digest = ?", [found[0].digest])
        return found[0]

    def close(self) -> None:
        self._db.close()
