"""Evidence by account: each query's p-value becomes a bet against honesty, and an account that wins too much is a thief's.

A p-value becomes an e-value, whose mean over honest queries is at most 1. Products of e-values are wealth: honest
accounts lose it, and by Ville's inequality one in 1 / delta of them at most ever reaches 1 / delta, however long it
asks. Three things stand between that sentence and a service, and each has its own remedy here:

- No parameter is tuned: the e-value is a mixture over a family of calibrators (Vovk and Wang 2021, section 2).
- The p-values of all queries share one calibration set, which may be lenient by chance. `safe_p_values` holds for all
  but a share `eta` of calibration sets (Bates, Candes, Lei, Romano and Sesia 2023, section 3).
- A thief may begin as an honest user, and would start from a fortune lost. `Wealth` starts a new bet at every query,
  with stakes that sum to 1 (mixtures over starting times: Shin, Ramdas and Rinaldo 2023): still wealth from 1, so the
  bound holds as it is, and a thief who begins at query t pays log(t (t + 1)) nats for it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy import stats
from torch import Tensor

DRAWS = 4_000  # simulated calibration sets behind a safe p-value


def log_e_values(p_values: Tensor) -> Tensor:
    """Natural logarithms, float64 [N], of the e-values of p-values [N] in (0, 1].

    e(p) = (1 - p + p log p) / (p log(p)^2), the mean of the calibrators k p^(k-1) over k in [0, 1] (Vovk and Wang 2021).
    It is below 1 for p above 0.16, and e(1) = 1/2.
    """
    surprise = -p_values.double().log()  # l; then e = (exp(l) - 1 - l) / l^2
    small = surprise.clamp(max=0.01)
    series = (0.5 + small / 6 + small.square() / 24).log()
    large = surprise.clamp(min=0.01)
    exact = large + torch.log1p(-(1 + large) * (-large).exp()) - 2 * large.log()
    return torch.where(surprise < 0.01, series, exact)


@lru_cache
def safe_p_values(count: int, eta: float = 0.05) -> Tensor:
    """What to put in the place of the conformal p-values 1 / (n + 1), ..., 1 of n calibration scores, float64 [n + 1].

    Given the calibration set, the chance that an honest query gets the p-value k / (n + 1) or less is a random number,
    Beta(k, n + 1 - k). All n of them are at most the numbers returned here, for a share 1 - eta of calibration sets: each
    is a quantile of its Beta distribution, at a level found by simulation (Bates et al. 2023, Monte Carlo adjustment).

    Raises:
        ValueError: no calibration scores, or eta outside (0, 1).
    """
    if count < 1 or not 0 < eta < 1:
        raise ValueError(f"calibration scores are needed, and eta above 0 and below 1; got {count} and {eta}")
    ranks = torch.arange(1, count + 1, dtype=torch.float64).numpy()
    generator = torch.Generator().manual_seed(0)
    least = []
    for _ in range(DRAWS // 100):
        uniform = torch.rand(100, count, generator=generator, dtype=torch.float64).sort(1).values.numpy()
        least.append(torch.from_numpy(stats.beta.sf(uniform, ranks, count + 1 - ranks)).amin(1))
    level = torch.cat(least).sort().values[max(0, math.floor(eta * (DRAWS + 1)) - 1)]
    bounds = torch.from_numpy(stats.beta.isf(float(level), ranks, count + 1 - ranks))
    return torch.cat([bounds.cummax(0).values, torch.ones(1, dtype=torch.float64)])


@dataclass
class Wealth:
    """The wealth of one account in one stream of evidence, in logarithms: it neither overflows nor vanishes.

        V(t) = (V(t-1) + stake(t)) e(t),    W(t) = V(t) + 1 / (t + 1),    stake(t) = 1 / (t (t + 1))

    The second term is the money not yet at stake.

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
        self.log_bets = _log_sum(self.log_bets, stake) + log_e
        return self.log_wealth

    @property
    def log_wealth(self) -> float:
        """log W; 0 before the first query."""
        return _log_sum(self.log_bets, -math.log(self.count + 1))


def _log_sum(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high)) if low > -math.inf else high
