"""PRADA (Juuti, Szyller, Marchal and Asokan 2019): watches the queries of one account, not single ones.

The distances of benign queries to earlier ones are roughly normal, those of an attack's made-up queries are not. Where
PRADA's paper (from memory) says nothing, its authors' public code decides; both, and what is ours, is said below.
"""

import warnings

import numpy as np
import torch
from scipy.stats import shapiro
from torch import Tensor

from samelib.data.image_set import LEVELS, check_queries, to_uint8

BLOCK = 512  # queries whose distances are computed together; no result depends on it
ENTRIES = 10  # a class joins the pool once it has this many distances (authors' code)
SIGMAS = 3


class GrowingSet:
    """The set G_c of one predicted class: a query joins when it is farther than T_c from all that joined before.

    T_c starts at 0 and becomes max(T_c, mean - deviation) of the distances at which queries joined. The first query
    joins at distance 0, which counts in mean and deviation (authors' code and paper); the deviation is the population's.
    """

    def __init__(self):
        self.images: Tensor | None = None  # uint8 [g, D]
        self.joined: list[float] = []
        self.threshold = 0.0

    def add(self, new: Tensor) -> np.ndarray:
        """Takes uint8 images [m, D] one after the other; the smallest distance of each to G_c as it was then [m].

        The first image of all has no distance: NaN. Distances are Euclidean, in pixels of the scale [-1, 1].
        """
        among = _distances(new, new)
        nearest = np.full(len(new), np.inf) if self.images is None else _distances(new, self.images).min(1)
        joining = []
        for i in range(len(new)):
            first = not self.joined
            if first or nearest[i] > self.threshold:
                self._join(0.0 if first else float(nearest[i]))
                joining.append(i)
                nearest[i + 1 :] = np.minimum(nearest[i + 1 :], among[i, i + 1 :])
        kept = [] if self.images is None else [self.images]
        self.images = torch.cat([*kept, new[joining]])
        return np.where(np.isinf(nearest), np.nan, nearest)

    def _join(self, distance: float) -> None:
        self.joined.append(distance)
        joined = np.array(self.joined)
        self.threshold = max(self.threshold, float(joined.mean() - joined.std()))


def _distances(a: Tensor, b: Tensor) -> np.ndarray:
    """Euclidean distances [m, g] of uint8 rows [m, D] and [g, D], in pixels of the scale [-1, 1].

    Squares of whole numbers are exact in float64 and NumPy's root is, so no distance depends on what it is computed with.
    """
    a, b = a.double(), b.double()
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return np.sqrt(squares.cpu().numpy()) / LEVELS


class Prada:
    """One account's growing sets and alarm.

    Pool: the distances of all queries, joined or not, of the classes with at least 10 of them; those 3 deviations or
    more from the pool's mean are dropped. With more than `minimum` left, the alarm is raised when the Shapiro-Wilk
    statistic W is below `threshold`. The test is made after every query (paper; the authors' code: every tenth), and an
    alarm stays (ours: an account that was caught is not let go; in the paper it can fall silent again).

    Attributes:
        alarm_at: number, from 1, of the query that raised the alarm; None so far.
        queries: how many were watched.
        sets: one GrowingSet a class.

    Args:
        classes: K.
        threshold: PRADA's delta, between 0 and 1 (0.9 to 0.96 in its paper, by data set).
        minimum: distances in the pool that are still too few for a test.

    Raises:
        ValueError: a number that cannot be.
    """

    def __init__(self, classes: int, threshold: float = 0.9, minimum: int = 100):
        if classes < 1 or not 0 < threshold < 1:
            raise ValueError(f"classes must be positive and threshold between 0 and 1, got {classes} and {threshold}")
        if minimum < 3:
            raise ValueError(
                f"minimum must be at least 3, the fewest that Shapiro and Wilk's test takes, got {minimum}"
            )
        self.classes, self.threshold, self.minimum = classes, threshold, minimum
        self.sets = [GrowingSet() for _ in range(classes)]
        self.alarm_at: int | None = None
        self.queries = 0
        self._image_shape: tuple[int, ...] | None = None
        self._found = np.empty(0)  # distances in the order of the queries, and their classes
        self._class = np.empty(0, dtype=np.int64)

    def watch(self, x: Tensor, answers: Tensor) -> Tensor:
        """Looks at the account's next queries, in order: bool [N], was the alarm raised at or before each?

        Args:
            x: images [N, C, H, W], uint8 or float in [-1, 1]; compared on the 8-bit grid.
            answers: the victim's probabilities [N, K]; the largest names the predicted class.

        Raises:
            ValueError: not one answer for each image, other classes, or images of another shape than before.
        """
        x = torch.as_tensor(x)
        x = to_uint8(check_queries(x, self._image_shape or tuple(x.shape[1:])))
        if tuple(answers.shape) != (len(x), self.classes):
            raise ValueError(f"{len(x)} images need answers [{len(x)}, {self.classes}], got {list(answers.shape)}")
        self._image_shape = tuple(x.shape[1:])
        predicted = answers.argmax(1)
        blocks = zip(x.flatten(1).split(BLOCK), predicted.to(x.device).split(BLOCK), strict=True)
        return torch.cat([self._watch_block(images, classes) for images, classes in blocks])

    def _watch_block(self, images: Tensor, predicted: Tensor) -> Tensor:
        classes = predicted.cpu().numpy()
        found = np.empty(len(images))
        for c in np.unique(classes):
            found[classes == c] = self.sets[c].add(images[predicted == int(c)])
        counts = ~np.isnan(found)
        ends = len(self._found) + counts.cumsum()
        self._found = np.concatenate([self._found, found[counts]])
        self._class = np.concatenate([self._class, classes[counts]])
        for i in np.flatnonzero(counts):
            if self.alarm_at is None and self._statistic(ends[i]) < self.threshold:
                self.alarm_at = self.queries + int(i) + 1
        numbers = torch.arange(self.queries + 1, self.queries + len(images) + 1)
        self.queries += len(images)
        return numbers >= (self.alarm_at or float("inf"))

    def _pool(self, end: int) -> np.ndarray:
        """The pool after the first `end` distances."""
        found, classes = self._found[:end], self._class[:end]
        pool = found[np.bincount(classes, minlength=self.classes)[classes] >= ENTRIES]
        if len(pool) == 0:
            return pool
        return pool[np.abs(pool - pool.mean()) < SIGMAS * pool.std()]  # equal distances all drop: nothing to test

    def _statistic(self, end: int) -> float:
        pool = self._pool(end)
        if len(pool) <= self.minimum:
            return float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # above 5,000 the p-value is inexact; only W is used
            return float(shapiro(pool).statistic)

    @property
    def distances(self) -> Tensor:
        """float64 [n]: the pool as it is now."""
        return torch.from_numpy(self._pool(len(self._found)))

    @property
    def statistic(self) -> float:
        """Shapiro-Wilk's W of the pool as it is now, 1 for a normal one; NaN while the pool is too small."""
        return self._statistic(len(self._found))


def watch_accounts(queries: Tensor, answers: Tensor, accounts: int, classes: int, **options) -> list[Prada]:
    """The query log dealt in turn to `accounts` accounts, each watched by a PRADA of its own.

    The distributed attack of the paper (Yao et al. 2023): none of the accounts sends enough to be tested.

    Args:
        queries: uint8 [N, ...] in order.
        answers: probabilities [N, K].
        options: of `Prada`.

    Raises:
        ValueError: no account, or what `Prada` refuses.
    """
    if accounts < 1:
        raise ValueError(f"there must be at least one account, got {accounts}")
    watchers = [Prada(classes, **options) for _ in range(accounts)]
    for i, watcher in enumerate(watchers[: len(queries)]):
        watcher.watch(queries[i::accounts], answers[i::accounts])
    return watchers
