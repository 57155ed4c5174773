from types import SimpleNamespace

import torch

from check_cases import Case
from samelib import ImageSet
from samelib.detectors.base import conformal_p_values
from samelib.service.stamps import StampOffice

IMAGES = torch.randint(256, (200, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SET = ImageSet(IMAGES, torch.zeros(200, dtype=torch.int64), ("dark", "bright"), "made up")
GROUP = SimpleNamespace(classes=2, calibration=SET[:120], benign_test=SET[120:], proxy=range(1000))


def score(x, answers=None):
    x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
    return x[:, 0].std((1, 2)) + x[:, 0, 0, 0]


def victim(x):
    return torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1).softmax(1)


RANKED = score(IMAGES[60:120])
DETECTOR = SimpleNamespace(
    score=score, calibration_scores=RANKED, p_values_of=lambda scores: conformal_p_values(scores, RANKED)
)


def by_class(images, first=60):
    named, found = victim(GROUP.calibration[first : first + 60].pixels()).argmax(1), torch.empty(len(images))
    mine = victim(images / 127.5 - 1).argmax(1)
    for k in range(2):
        found[mine == k] = conformal_p_values(score(images[mine == k]), RANKED[named == k])
    return found


class Careless(StampOffice):
    def issue(self, query, bits):
        return super().issue(bytes(32), bits)

    def check(self, stamp, query):
        return super().check(stamp, bytes(32))


class HalfCareless(StampOffice):
    def issue(self, query, bits):
        return super().issue(bytes(32), bits)


class TooCareless(Careless):
    def spend(self, challenges):
        pass


CASES = {
    "e1001": Case(
        (15, 32768, 0.033, 0.05),
        [(5, 32, 3.2e-5, 0.05), (16, 65536, 0.066, 0.05), (15, 32768, 33, 0.05), (15, 32768, 0.033, 0.95), 15],
    ),
    "e1002": Case((10, 10, 1023), [(11, 9, 511), (10, 10, 1024), (9, 10, 1023), (8, 13, 8191), (10, 10, 2**20 - 1)]),
    "e1003": Case(
        (600, 300, 0.7),
        [(300, 150, 0.7), (450, 225, 0.7), (600, 600, 0.7), (600, 300, 70), (2000, 1000, 0.7), (300, 600, 0.7)],
        (lambda name, kind: 0.5, GROUP, 300),
    ),
    "e1004": Case(Careless, [StampOffice, HalfCareless, TooCareless, Careless(bytes(32))]),
    "e1006": Case(
        by_class,
        [
            lambda images: DETECTOR.p_values_of(score(images)),
            lambda images: by_class(images, 0),
            lambda images: by_class(images) <= 0.5,
            by_class(IMAGES[:5]),
        ],
        (DETECTOR, victim, GROUP),
    ),
}
