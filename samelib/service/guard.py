"""A Defence behind a queue, with the stamps of its proof of work and the door that banned accounts find closed."""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from starlette.requests import Request
from torch import Tensor

from samelib.accounts import AccountBook, AccountsFull
from samelib.data.image_set import received, to_uint8
from samelib.gateway import Defence
from samelib.service.batching import Batcher, QueueFull
from samelib.service.intake import ApiError, Limits, api_key
from samelib.service.stamps import Challenge, SpentFull, StampError, StampOffice, query_digest


class Reply(NamedTuple):
    """What becomes of one image.

    Attributes:
        status: "answered", "refused" or "challenge"; what belongs to another status is None.
        probabilities: [K], of an answer.
        challenge: of a proof of work, and `bits`, its difficulty.
        p_value: the detector's, for the metrics; None where it did not look.
    """

    status: str
    probabilities: list[float] | None = None
    challenge: str | None = None
    bits: int | None = None
    p_value: float | None = None


class Guard:
    """Judges requests in batches; an image with a good stamp counts as paid: it is answered without being scored again.

    Args:
        defence: victim, detector and response.
        office: gives out challenges and takes stamps; by default one whose secret dies with it.
        limits: of a batch, of the queue, and of the wait for an answer.
        account: who sends a request, where the response goes by accounts.

    Attributes:
        accounts: where the response keeps accounts; None: it does not go by them.
        watches: nothing is refused, and no work is asked.
    """

    def __init__(
        self,
        defence: Defence,
        office: StampOffice | None,
        limits: Limits,
        account: Callable[[Request], str] = api_key,
    ):
        self._defence, self._seconds, self._account = defence, limits.answer_seconds, account
        self.office = office or StampOffice(secrets.token_bytes(32))
        response = defence.response
        self.accounts: AccountBook | None = response.accounts if response and response.by_account else None
        self.watches = response is None or not response.enforce
        self.batcher = Batcher(self._judge, limits.images, limits.queue)

    def _judge(self, accounts: list[str], images: Tensor, paid: Tensor, answers: Tensor | None = None):
        """Answers [N, K], p-values [N] (NaN where nothing was scored), refused [N] and bits [N], in the model's thread."""
        verdict = self._defence.judge(images, paid, accounts, answers)
        p_values = torch.full([len(images)], torch.nan) if verdict.p_values is None else verdict.p_values
        return tuple(part.cpu() for part in (verdict.answers, p_values, verdict.refused, verdict.bits))

    def warm_up(self, ask: bool = True) -> None:
        """Judges the smallest and the largest batch once: the first user does not pay for what is loaded lazily.

        Without the response: these are nobody's queries.

        Args:
            ask: the victim too; else its answers are made up, because it is elsewhere.
        """
        victim = self._defence.victim
        defence = Defence(victim, self._defence.detector)
        for count in (1, self.batcher.most_images):
            images = torch.zeros(count, *victim.image_shape, dtype=torch.uint8)
            answers = None if ask else torch.full([count, victim.classes], 1 / victim.classes)
            defence.judge(images, answers=answers)

    async def admit(self, request: Request) -> str:
        """The account of a request, before anything is computed for it; "" where the response goes by none, or only watches
        and the request names none.

        Raises:
            ApiError: 403 for a banned account, and what `account` raises.
        """
        if self.accounts is None:
            return ""
        try:
            key = self._account(request)
        except ApiError:
            if self.watches:
                return ""
            raise
        if self.watches:
            return key
        banned = await asyncio.to_thread(self.accounts.find_banned, key)
        if banned:
            words = f"account {banned.label} is banned; write to whoever runs this service, and name it"
            raise ApiError(403, "banned", words)
        return key

    def received(self, images: Tensor) -> Tensor:
        """Images that somebody decoded, as uint8 [N, C, H, W].

        Raises:
            TypeError, ValueError: not what the model takes (see `check_queries`).
            ApiError: 422, more than one request may have.
        """
        images = to_uint8(received(images, self._defence.victim.image_shape))
        if len(images) > self.batcher.most_images:
            words = f"{len(images)} images came in one request; send {self.batcher.most_images} at most"
            raise ApiError(422, "images", words)
        return images

    async def reply(self, images: Tensor, stamps: list[str], account: str) -> list[Reply]:
        """What becomes of images uint8 [N, C, H, W] that an account sent with these stamps (empty where there is none).

        Raises:
            ApiError: 403, 422, 429, 503 or 504. All stamps of a request are spent, or none: then and only then it is
                answered.
        """
        if stamps and len(stamps) != len(images):
            words = f"{len(images)} images came with {len(stamps)} stamps; send one for each, or none"
            raise ApiError(422, "stamps", words)
        stamps = stamps or [""] * len(images)
        challenges = await asyncio.to_thread(self._check, images, stamps) if any(stamps) else []
        rows = await self.judge(images, account, paid=torch.tensor([bool(stamp) for stamp in stamps]))
        if challenges:
            await self.spend(challenges)
        return [self._reply(*row) for row in zip(images, *rows, strict=True)]

    async def judge(
        self, images: Tensor, account: str, paid: Tensor | None = None, answers: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Answers [N, K], p-values [N], refused [N] and bits [N] for images uint8 [N, C, H, W] (see `Defence.judge`).

        Raises:
            ApiError: 429, 503 or 504.
            ValueError: the answers are no probabilities.
        """
        columns = (images, torch.zeros(len(images), dtype=torch.bool) if paid is None else paid)
        if answers is not None:  # checked before they are put beside those of other requests
            columns += (self._defence.victim.checked(answers, len(images)),)
        with _told():
            async with asyncio.timeout(self._seconds):
                return await self.batcher.submit(account, *columns)

    async def spend(self, challenges: list[Challenge]) -> None:
        """Spends stamps that were checked (ApiError 403 or 503 where that fails)."""
        with _told():
            await asyncio.to_thread(self.office.spend, challenges)

    def check(self, stamp: str, query: Tensor, image: int | None = None) -> Challenge:
        """The challenge that a stamp answers, if it is good for this query, uint8 [..., C, H, W].

        Raises:
            ApiError: 403, of that image of the request.
        """
        with _told(image):
            return self.office.check(stamp, query_digest(query))

    def _check(self, images: Tensor, stamps: list[str]) -> list[Challenge]:
        return [self.check(stamps[i], images[i], i) for i in range(len(images)) if stamps[i]]

    async def close(self) -> None:
        """Finishes what was taken, then stops; a model that does not answer is not waited for."""
        await self.batcher.close(self._seconds)
        self.office.spent.close()

    def _reply(self, image: Tensor, answer: Tensor, p_value: Tensor, refused: Tensor, bits: Tensor) -> Reply:
        seen = None if p_value.isnan() else float(p_value)
        if refused:
            return Reply("refused", p_value=seen)
        if bits:
            challenge = self.office.issue(query_digest(image), int(bits))
            return Reply("challenge", challenge=challenge, bits=int(bits), p_value=seen)
        return Reply("answered", answer.tolist(), p_value=seen)


@contextmanager
def _told(image: int | None = None) -> Iterator[None]:
    """What goes wrong in the block, as the client reads it; of that image, where it is about one."""
    try:
        yield
    except StampError as error:
        raise ApiError(403, error.reason, str(error), image) from error
    except QueueFull as error:
        raise ApiError(429, "busy", "too many images are waiting; try again later", retry_after=1) from error
    except SpentFull as error:
        raise ApiError(503, "stamps_full", "too many stamps were spent; try again later", retry_after=60) from error
    except AccountsFull as error:
        words = "there is no place for a new account; write to whoever runs this service"
        raise ApiError(503, "accounts_full", words, retry_after=60) from error
    except TimeoutError as error:
        raise ApiError(504, "timeout", "the answer took too long; nothing was spent", retry_after=1) from error
