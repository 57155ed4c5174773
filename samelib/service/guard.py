"""What the service decides about each image of a request: answer, refuse, or ask for work first."""

import asyncio
import secrets
from typing import NamedTuple

import torch
from torch import Tensor

from samelib.data.image_set import to_float
from samelib.detectors.base import Detector
from samelib.gateway import Policy
from samelib.models.classifiers import Victim
from samelib.service.batching import Batcher
from samelib.stamps import Challenge, StampError, StampOffice, query_digest

ANSWERED, REFUSED, CHALLENGED = "answered", "refused", "challenge"


class BadStamp(StampError):
    """A StampError that knows which image of the request it is about."""

    def __init__(self, error: StampError, image: int | None):
        super().__init__(error.reason, str(error))
        self.image = image


class Reply(NamedTuple):
    """What becomes of one image: `kind` is one of the three above; what belongs to the other two is None.

    Attributes:
        probabilities: [K], of an answer.
        challenge: text, of a challenge.
        p_value: the detector's, for the metrics; None where it did not look.
    """

    kind: str
    probabilities: list[float] | None = None
    challenge: str | None = None
    p_value: float | None = None


class Guard:
    """A victim behind its detector and response.

    An image without a stamp is scored; the response decides by its p-value. One that comes with a good stamp is
    answered without being scored again: its price was set when the challenge was given.

    Args:
        victim: what answers.
        detector: what scores; None: nothing is scored.
        response: see samelib.responses; None: everything is answered.
        office: gives out challenges and takes stamps; by default one whose secret dies with it.
        most_images, capacity: see Batcher.

    Raises:
        ValueError: a response without a detector, or a detector that was fitted to other images or classes.
    """

    def __init__(
        self,
        victim: Victim,
        detector: Detector | None,
        response: Policy | None,
        office: StampOffice | None,
        most_images: int,
        capacity: int,
    ):
        if response is not None and detector is None:
            raise ValueError("a response needs a detector that says which queries look strange")
        if fitted_to := getattr(detector, "victim", None):
            victim.require(fitted_to.image_shape, fitted_to.classes)
        self.victim, self.detector, self.response = victim, detector, response
        self.office = office or StampOffice(secrets.token_bytes(32))
        self.batcher = Batcher(self._work, most_images, capacity)

    @torch.inference_mode()
    def _work(self, images: Tensor, watched: Tensor) -> tuple[Tensor, Tensor]:
        """Answers [N, K] and p-values [N] (NaN for images that are not watched), in the model's thread."""
        x = to_float(images)
        answers, p_values = self.victim(x), torch.full([len(x)], torch.nan)
        if self.detector is not None and watched.any():
            scores = self.detector.score(x[watched], answers[watched])
            p_values[watched] = self.detector.p_values_of(scores).cpu().float()
        return answers.cpu(), p_values

    def warm_up(self) -> None:
        """Runs the smallest and the largest batch once: the first user does not pay for what is loaded lazily."""
        for count in (1, self.batcher.most_images):
            self._work(torch.zeros(count, *self.victim.image_shape, dtype=torch.uint8), torch.ones(count).bool())

    async def reply(self, images: Tensor, stamps: list[str | None], seconds: float) -> list[Reply]:
        """What becomes of images uint8 [N, C, H, W] that came with these stamps; all stamps of a request are spent, or
        none.

        Raises:
            BadStamp: a stamp is refused.
            SpentFull, QueueFull: too much at once; nothing was spent.
            TimeoutError: it took longer than `seconds`; nothing was spent.
        """
        stamped = torch.tensor([stamp is not None for stamp in stamps])
        challenges = await asyncio.to_thread(self._check, images, stamps) if stamped.any() else []
        async with asyncio.timeout(seconds):
            answers, p_values = await self.batcher.compute(images, ~stamped)
        if challenges:
            await asyncio.to_thread(self._spend, challenges)
        return self._decided(images, stamped, answers, p_values)

    def _check(self, images: Tensor, stamps: list[str | None]) -> list[Challenge]:
        challenges = []
        for place, (image, stamp) in enumerate(zip(images, stamps, strict=True)):
            if stamp is not None:
                try:
                    challenges.append(self.office.check(stamp, query_digest(image)))
                except StampError as error:
                    raise BadStamp(error, place) from error
        return challenges

    def _spend(self, challenges: list[Challenge]) -> None:
        try:
            self.office.spend(challenges)
        except StampError as error:
            raise BadStamp(error, None) from error

    def _decided(self, images: Tensor, stamped: Tensor, answers: Tensor, p_values: Tensor) -> list[Reply]:
        refused, bits = torch.zeros(len(images)).bool(), torch.zeros(len(images), dtype=torch.int64)
        if self.response is not None and not stamped.all():
            refused[~stamped], bits[~stamped] = self.response.decide(p_values[~stamped])
        replies = []
        for place, p_value in enumerate(p_values.tolist()):
            seen = None if p_value != p_value else p_value
            if refused[place]:
                replies.append(Reply(REFUSED, p_value=seen))
            elif bits[place]:
                challenge = self.office.issue(query_digest(images[place]), int(bits[place]))
                replies.append(Reply(CHALLENGED, challenge=challenge, p_value=seen))
            else:
                replies.append(Reply(ANSWERED, answers[place].tolist(), p_value=seen))
        return replies
