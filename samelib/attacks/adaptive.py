"""Attackers who know that somebody looks: what they ask beside, what they buy, whom they ask as, what they do without.

How they make their images look benign is in samelib.attacks.disguise; how they learn from refusals in
samelib.attacks.knockoff (`AdaptiveKnockoff`), and JBDA's steps inside the stroke in samelib.attacks.jbda.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samelib.attacks.base import Querier, TransferSet, answered
from samelib.attacks.knockoff import Knockoff
from samelib.data.image_set import ImageSet, check_queries, to_float
from samelib.gateway import Gateway
from samelib.models.classifiers import predict
from samelib.training import TrainSettings


class Mixing(Knockoff):
    """Knows that what an account asks is looked at together, and hides among benign queries of their own.

    Of the first n queries floor(n share) are benign, for every n; when all of those were asked, they are asked again.
    The substitute learns from both kinds.

    Args:
        proxy: the attacker's images.
        benign: images such as honest users ask.
        architecture, settings, seed, labels: see `TransferAttack`.
        share: of benign queries among all, 0 <= share < 1.

    Raises:
        ValueError: no benign images, such as are unlike the proxy set, or a share outside [0, 1).
    """

    def __init__(
        self,
        proxy: ImageSet,
        benign: ImageSet,
        architecture: str | None = None,
        settings: TrainSettings | None = None,
        seed: int = 0,
        *,
        share: float = 0.5,
        labels: str = "soft",
    ):
        super().__init__(proxy, architecture, settings, seed, labels=labels)
        if not 0 <= share < 1:
            raise ValueError(f"the share of benign queries must be at least 0 and below 1, got {share}")
        if not len(benign) or benign.image_shape != proxy.image_shape:
            raise ValueError(
                f"{len(benign)} benign images {benign.image_shape} cannot hide proxy images {proxy.image_shape}; "
                "bring some of the same shape"
            )
        self.benign, self.share = benign, share

    def _benign(self, count: int) -> Tensor:
        """Which of the first `count` queries are benign, bool [count]."""
        so_far = (torch.arange(count + 1, dtype=torch.float64) * self.share + 1e-9).floor()
        return so_far.diff() > 0

    def check_budget(self, budget: int) -> None:
        """Raises ValueError when the proxy set holds fewer images than the other queries are."""
        super().check_budget(int((~self._benign(budget)).sum()))

    def draw(self, count: int, image_shape: tuple[int, int, int]) -> Tensor:
        self.check_budget(count)
        benign = self._benign(count)
        images = self.proxy.images.new_empty(count, *image_shape)
        images[~benign] = self.proxy.shuffled(self.seed)[: int((~benign).sum())].images
        turns = torch.arange(int(benign.sum())) % len(self.benign)
        images[benign] = self.benign.shuffled(self.seed).images[turns.to(self.benign.device)].to(images.device)
        return images


class Bargain(Knockoff):
    """Knows that a service names its price before it is paid, asks that of every image they hold, and buys the cheapest.

    A price takes a request and no work, and tells the detector's p-value to a factor of two (see `ProofOfWork`).

    Args:
        proxy: the attacker's images.
        architecture, settings, seed, labels: see `TransferAttack`.
    """

    def collect(self, querier: Querier) -> TransferSet:
        self.check_budget(querier.budget)
        candidates = self.proxy.shuffled(self.seed).images
        cheapest = querier.quote(candidates).argsort(stable=True)[: querier.budget]
        images = candidates[cheapest.to(candidates.device)]
        return TransferSet(images, querier.ask(images))


class SelfTraining(Knockoff):
    """Knows that answers are dear, and does with few: the substitute labels the images that have none, and learns again.

    A second substitute is trained on all answers and, as if they had been answered, on those images that the first one
    is sure of: refused ones, and others that were never asked (pseudo-labels: Lee 2013; the threshold: Sohn et al. 2020).

    Args:
        proxy: the attacker's images.
        architecture, settings, seed, labels: see `TransferAttack`.
        confidence: the first substitute is sure of a class from this probability on.
        unasked: how many images that were never asked are used, where there are so many.

    Raises:
        ValueError: a confidence outside (0, 1], or a negative number of images.
    """

    def __init__(
        self,
        proxy: ImageSet,
        architecture: str | None = None,
        settings: TrainSettings | None = None,
        seed: int = 0,
        *,
        confidence: float = 0.95,
        unasked: int = 4_000,
        labels: str = "soft",
    ):
        super().__init__(proxy, architecture, settings, seed, labels=labels)
        if not 0 < confidence <= 1 or unasked < 0:
            raise ValueError(
                f"confidence must be above 0 and at most 1, unasked at least 0, got {confidence} and {unasked}"
            )
        self.confidence, self.unasked = confidence, unasked

    def train_substitute(self, images: Tensor, answers: Tensor, settings: TrainSettings | None = None) -> nn.Module:
        substitute = super().train_substitute(images, answers, settings)
        if not answered(answers).any():  # it has learnt nothing that it could teach
            return substitute
        others = self.proxy.shuffled(self.seed).images[len(images) :][: self.unasked]
        images = torch.cat([images, others])
        answers = torch.cat([answers, answers.new_full((len(others), answers.shape[1]), torch.nan)])
        guesses = predict(substitute, to_float(images)).to(answers.device)
        sure = ~answered(answers) & (guesses.amax(1) >= self.confidence)
        answers[sure] = nn.functional.one_hot(guesses[sure].argmax(1), answers.shape[1]).to(answers.dtype)
        return super().train_substitute(images, answers, settings)


def shares(queries: int, accounts: int) -> list[int]:
    """How many of so many queries each account asks when they are dealt out in turn."""
    return [queries // accounts + (number < queries % accounts) for number in range(accounts)]


class RoundRobin(Gateway):
    """Has several accounts, and deals the queries out to them in turn: to any attack it is one gateway.

    Args:
        gateways: one an account, all to the same victim. Those whose budget is spent are passed over.

    Raises:
        ValueError: no gateways, or such to different victims.
    """

    def __init__(self, gateways: Sequence[Gateway]):
        if not gateways:
            raise ValueError("there must be at least one account: pass a gateway for each")
        victims = {(gateway.image_shape, gateway.classes) for gateway in gateways}
        if len(victims) > 1:
            raise ValueError(f"the accounts must be of one service, these take images and name classes {victims}")
        self.gateways, self._turn = list(gateways), 0
        super().__init__(*victims.pop(), None if self.remaining == float("inf") else self.remaining)

    @property
    def remaining(self) -> float:
        return sum(gateway.remaining for gateway in self.gateways)

    def quote(self, x: Tensor) -> Tensor:
        return self.gateways[0].quote(x)

    def _ask(self, x: Tensor) -> dict[str, Tensor]:
        x = check_queries(x, self.image_shape)  # what is no image is said before any account asks
        turns, records = self._deal(len(x)), {}
        for number in turns.unique().tolist():
            part, gateway = turns == number, self.gateways[number]
            gateway.query(x[part.to(x.device)])
            for name, rows in gateway.log.last(int(part.sum())).items():
                records.setdefault(name, rows.new_empty(len(x), *rows.shape[1:]))[part.to(rows.device)] = rows
        return records

    def _deal(self, count: int) -> Tensor:
        """Whose turn each of the next queries is, int64 [count]."""
        left, turns = [gateway.remaining for gateway in self.gateways], []
        while len(turns) < count:
            number, self._turn = self._turn, (self._turn + 1) % len(left)
            if left[number] > 0:
                turns.append(number)
                left[number] -= 1
        return torch.tensor(turns)
