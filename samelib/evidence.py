"""Evidence by account: each query's p-value becomes a bet against honesty, and an account that wins too much is a thief's.

A p-value becomes an e-value, whose mean over honest queries is at most 1. Products of e-values are wealth: honest
accounts lose it, and by Ville's inequality one in 1 / delta of them at most ever reaches 1 / delta, however long it
asks. Three things stand between that sentence and a service, and each has its own remedy here:

- No parameter is tuned: the e-value is a mixture over a family of calibrators (Vovk and Wang 2021, section 2).
- The p-values of all queries share one calibration set, which may be lenient by chance. `safe_p_values` holds for all
  but a share `eta` of calibration sets (the idea of Bates, Candes, Lei, Romano and Sesia 2023).
- A thief may begin as an honest user, and would start from a fortune lost. `Wealth` starts a new bet at every query,
  with stakes that sum to 1 (mixtures over starting times: Shin, Ramdas and Rinaldo 2023): still wealth from 1, so the
  bound holds as it is, and a thief who begins at query t pays log(t (t + 1)) nats for it.

Two kinds of p-values feed it: how strange a query is (a detector's), and how like an earlier one of its account
(`Likeness`).
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

SKETCH = 64  # numbers that stand for an image
FEWEST, MOST = 16, 256  # sketches in an account's memory: below, likeness says nothing; above, one replaces another


def log_e_values(p_values: Tensor) -> Tensor:
    """Natural logarithms, float64 [N], of the e-values of p-values [N] in (0, 1].

    e(p) = (1 - p + p log p) / (p log(p)^2), the mean of the calibrators k p^(k-1) over k from 0 to 1 (Vovk and Wang
    2021). It is above 1 for p below 1/6, about, and never below e(1) = 1/2.
    """
    surprise = -p_values.double().log()  # l; then e = (exp(l) - 1 - l) / l^2
    small, large = surprise.clamp(max=1e-3), surprise.clamp(min=1e-3)
    series = (0.5 + small / 6 + small.square() / 24).log()
    exact = large + torch.log1p(-(1 + large) * (-large).exp()) - 2 * large.log()
    return torch.where(surprise < 1e-3, series, exact)


@lru_cache
def safe_p_values(count: int, eta: float = 0.05) -> Tensor:
    """What to put in the place of the conformal p-values 1 / (n + 1), ..., 1 of n calibration scores, float64 [n + 1].

    Given the calibration set, the chance that an honest query gets the p-value k / (n + 1) or less is a random number,
    Beta(k, n + 1 - k). For a share 1 - eta of calibration sets it is, for all k at once, at most the k-th number here:
    a quantile of that distribution for k = 1, 2, 3, 4, 6, 8, 11, ..., n (their errors add up to eta, by Bonferroni's
    inequality), and for others that of the next such k. The smallest is about 6 / n, not 1 / n.

    Raises:
        ValueError: no calibration scores, or eta outside (0, 1).
    """
    if count < 1 or not 0 < eta < 1:
        raise ValueError(f"calibration scores are needed, and eta above 0 and below 1; got {count} and {eta}")
    ranks = np.unique(np.append((2 ** np.arange(0, math.log2(count), 0.5)).round(), count))
    bounds = stats.beta.isf(eta / len(ranks), ranks, count + 1 - ranks)
    safe = bounds[np.searchsorted(ranks, np.arange(1, count + 1))]
    return torch.from_numpy(np.append(safe, 1.0))


@dataclass
class Wealth:
    """The wealth of one account in one stream of evidence, in logarithms: it neither overflows nor vanishes.

        V(t) = (V(t-1) + stake(t)) e(t),    W(t) = V(t) + 1 / (t + 1),    stake(t) = 1 / (t (t + 1))

    The second term is the money not yet at stake. (An array of logarithms makes it the wealth of many accounts.)

    Attributes:
        count: queries so far.
        log_bets: log V.
    """

    count: int = 0
    log_bets: float = -math.inf

    def add(self, log_e: float) -> float:
        """Takes one more e-value in; returns log W."""
        self.count += 1
        stake = -math.log(self.count) - math.log(self.count + 1)
        self.log_bets = np.logaddexp(self.log_bets, stake) + log_e
        return self.log_wealth

    @property
    def log_wealth(self) -> float:
        """log W; 0 before the first query."""
        return np.logaddexp(self.log_bets, math.log(1 / (self.count + 1)))


@lru_cache(maxsize=8)
def _signs(pixels: int) -> Tensor:
    """float64 [pixels, SKETCH] of -1 and 1; from a hash, not a generator, because sketches are kept for long."""
    stream = hashlib.shake_256(b"samelib.sketches").digest(pixels * SKETCH // 8)
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8)).reshape(pixels, SKETCH)
    return torch.from_numpy(2.0 * bits - 1)


def sketches(images: Tensor) -> np.ndarray:
    """int32 [N, SKETCH] of images uint8 [N, C, H, W]: sums of their pixels with random signs, the same everywhere.

    The squared distance of two sketches is SKETCH times that of the images in the mean over the signs, with a relative
    error of about 18 % (Johnson and Lindenstrauss). Sums of whole numbers are exact: equal images, equal sketches.
    """
    signs = _signs(math.prod(images.shape[1:]))
    return torch.cat([part.cpu().flatten(1).double() @ signs for part in images.split(256)]).int().numpy()


class Likeness:
    """Conformal p-values of how near a query comes to earlier ones of its account, against simulated benign accounts.

    JBDA and its kin send variations of images that they sent before; benign queries are no nearer to each other than
    calibration images are. The calibration images are laid out in a random circle. For each, and each memory of m
    sketches, the nearest distance to the m that follow it is what a benign account with that memory would have seen;
    p = (1 + how many of these n are at most the query's own) / (n + 1).

    Each of the n distances is distributed exactly as that of an honest query to an honest memory, if the account's
    queries are exchangeable with the calibration images. The rest is approximate: the n distances share images, and
    given an account's memory, which changes slowly, its p-values are not uniform; an account whose memory lies in a
    crowd is always a little nearer than others. That honest accounts stay below the bound all the same was simulated
    (tests/test_evidence.py), not proven, and with `safe_p_values`: plain ones let too many reach it. Users whose
    queries resemble each other more than calibration images do (one handwriting, one scene) look like thieves to this,
    and the sketches say something of the images they were made of.

    Distances are those of pixels. In the autoencoder's latent they were no better (glyphs, lecture tier, one seed, a
    bound of 1,000): JBDA is banned 7 queries after its seeds in both, at direction − and step 0.2 there only in pixels;
    copies that are moved by a pixel at random after 59 queries in pixels and 35 in the latent, by two pixels in neither.

    Args:
        calibration: sketches int32 [n, SKETCH] of benign images, all different.
    """

    def __init__(self, calibration: np.ndarray):
        self.calibration = calibration

    def __len__(self) -> int:
        """n."""
        return len(self.calibration)

    @property
    def most(self) -> int:
        """How large a memory can be judged."""
        return min(MOST, len(self) - 1)

    @cached_property
    def _nearest(self) -> np.ndarray:
        """Squared distances, float64 [most - FEWEST + 1, n], each row sorted: to memories of FEWEST, ..., most."""
        circle = np.random.RandomState(0).permutation(self.calibration).astype(np.float64)
        least, rows = np.full(len(circle), np.inf), []
        for step in range(1, self.most + 1):
            least = np.minimum(least, np.square(circle - np.roll(circle, -step, 0)).sum(1))
            if step >= FEWEST:
                rows.append(np.sort(least))
        return np.stack(rows)

    def p_value(self, sketch: np.ndarray, memory: np.ndarray) -> float | None:
        """Of a query's sketch [SKETCH] beside a memory int32 [m, SKETCH]; None while m is below FEWEST."""
        memory = memory[: self.most].astype(np.float64)
        if len(memory) < FEWEST:
            return None
        nearest = np.square(memory - sketch).sum(1).min()
        benign = self._nearest[len(memory) - FEWEST]
        return (1 + np.searchsorted(benign, nearest, side="right")) / (len(benign) + 1)
