"""What the scripts of servers share: two models, and what `Guarded` is given with each."""

import os

import torch
from serving import CLASSES, SHAPE, Ranked, quarters
from torch import Tensor

from samelib import ProofOfWork, Reject, Victim
from samelib.data.image_set import to_float
from samelib.detectors import load_detector
from samelib.responses import Response

WORK = ProofOfWork(0, 4)
SECRET = b"a secret of tests" * 2


class RejectOrWork(Response):
    """Refuses the strangest images, and asks work for others: a server starts once for both."""

    def decide(self, p_values, queries=None, accounts=None):
        refused, _ = Reject(0.05).decide(p_values)
        return refused, torch.where(refused, 0, WORK.decide(p_values)[1])


def tiny() -> tuple[Victim, dict]:
    elsewhere = Victim.elsewhere(SHAPE, CLASSES)
    return Victim(quarters, SHAPE, CLASSES), {"detector": Ranked(), "response": RejectOrWork(), "victim": elsewhere}


def fitted() -> tuple[Victim, dict]:
    """A detector that the test saved."""
    detector = load_detector(os.environ["DETECTOR"])
    return detector.victim, {"detector": detector, "response": Reject(0.05)}


CASES = {"tiny": tiny, "fitted": fitted}


def answer(victim: Victim, images: Tensor) -> dict:
    """What a model says of images uint8 [N, C, H, W]; the file CALLS gets a line that says how many they were."""
    with open(os.environ["CALLS"], "a") as calls:
        print(len(images), file=calls)
    rows = victim(to_float(images))
    return {"probabilities": rows.tolist(), "labels": rows.argmax(1).tolist(), "model": "victim"}
