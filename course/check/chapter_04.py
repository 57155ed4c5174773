"""Checks of chapter 4, the anomaly score."""

import numpy as np
from scipy.stats import binom

from course.check.verdict import close, exercise, expect, expect_shares, number, numbers


@exercise("the standardised alpha, a number between 0 and 1")
def e0401(answer, sigma_r, sigma_d):
    alpha, ratio = number(answer), float(sigma_r / sigma_d)
    odds, inverse = 99 * ratio, 99 / ratio
    if not close(alpha, odds / (1 + odds)):
        expect(
            not close(alpha, 0.99),
            "0.99 is the alpha on the raw scale; the standardised one depends on the two spreads.",
        )
        expect(not close(alpha, inverse / (1 + inverse)), "the ratio of the spreads is upside down.")
        expect(not close(alpha, odds), "those are the odds; turn them back into a share.")
        expect(False, "write the odds alpha / (1 - alpha) on both scales: what multiplies them?")


@exercise("(AUROC, FPR95)")
def e0402(answer):
    auroc, fpr95 = numbers(answer, 2)
    expect(not close(auroc, 14 / 16), "the tie is one half of a pair, not none.")
    expect(not close(auroc, 15 / 16), "the tie is one half of a pair, not a whole one.")
    expect(close(auroc, 14.5 / 16), "AUROC: of the 16 pairs, in how many is the malicious score the higher one?")
    expect(fpr95 != 0.25, "the benign 3 is flagged too: its score is that of the malicious one which must be caught.")
    expect(
        close(fpr95, 0.5), "FPR95: which threshold catches all four malicious queries? Which benign ones does it flag?"
    )


@exercise("the share of flagged queries of each class, a dictionary by the class's name")
def e0403(answer, benign_scores, thresholds, group):
    flagged = benign_scores > thresholds[0.05]
    labels = group.benign_test.labels.cpu().numpy()[: len(flagged)]
    expect(isinstance(answer, dict) and len(answer) == group.classes, f"a rate for each of {group.classes} classes.")
    rates = numbers(answer)
    right = [flagged[labels == k].mean() for k in range(group.classes)]
    shares = [(flagged & (labels == k)).mean() for k in range(group.classes)]
    expect(
        not np.allclose(rates, shares, atol=1e-4) or np.allclose(shares, right),
        "divide by the queries of the class, not by all queries.",
    )
    expect(
        np.allclose(rates, right, atol=2e-3), "of the queries of one class, which share is above the threshold of 5 %?"
    )


@exercise("(how likely 12 flags or more are for an honest user, the number of flags that raises the alarm)")
def e0404(answer):
    likely, flags = numbers(answer, 2)
    expect(not close(likely, binom.pmf(12, 100, 0.05)), "that is for exactly 12 flags: 13 and more count too.")
    expect(not close(likely, binom.sf(12, 100, 0.05)), "that is for more than 12 flags: 12 count too.")
    expect(
        close(likely, binom.sf(11, 100, 0.05)), "sum the binomial probabilities of 12 and more flags among 100 queries."
    )
    right = binom.isf(0.001, 100, 0.05) + 1
    expect(
        flags != right - 1, f"at {flags:.0f} flags, an honest user still raises it more often than once in a thousand."
    )
    expect(flags == right, "the smallest number that an honest user reaches with a probability of 1 in 1,000 at most.")


@exercise('{"least suspicious": (share caught at 5 %, fidelity), "random": (share caught at 5 %, fidelity)}')
def e0405(answer, scores, thresholds):
    expect(isinstance(answer, dict) and set(answer) == {"least suspicious", "random"}, "name the two substitutes.")
    (low, low_fidelity), (high, fidelity) = (numbers(answer[name], 2) for name in ("least suspicious", "random"))
    expect_shares(low, low_fidelity, high, fidelity)
    knockoff = scores["knockoff"].sort().values.cpu().numpy()
    right = (knockoff[: len(knockoff) // 3] > thresholds[0.05]).mean()
    most = (knockoff > thresholds[0.05]).mean()
    expect(
        close(low, right, absolute=0.01),
        "take the third with the lowest scores: how many of them are above the threshold?",
    )
    expect(abs(high - most) < 0.1, "a random third is caught about as often as all the queries of Knockoff.")
    expect(
        min(low_fidelity, fidelity) > 0.1, "a substitute that agrees with the victim on a tenth or less learnt nothing."
    )
    cost = fidelity - low_fidelity
    return f"evasion costs {100 * cost:.1f} points of fidelity here; repeat it with several seeds before you conclude anything."
