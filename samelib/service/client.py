"""The other end of the wire: a gateway to a service, for attacks, tests and honest clients alike."""

import io
import time
from collections.abc import Sequence

import httpx
import torch
from PIL import Image
from torch import Tensor

from samelib.data.image_set import check_queries, to_uint8
from samelib.gateway import BudgetExceeded, Gateway
from samelib.service.intake import API_KEY
from samelib.service.stamps import solve

BUSY = (429, 503)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RemoteError(RuntimeError):
    """The service cannot be reached, or refused a request as a whole; what it answered before is in the log."""


class Banned(RemoteError):
    """The service answers this account no more."""


def as_png(image: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] as a PNG file."""
    file = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()


class RemoteGateway(Gateway):
    """The same door as QueryGateway, over HTTP: images leave as PNG files, challenges are solved on the way. Where the
    account is banned, its queries are refused, and counted, like others.

    The log holds for each query the hashes that it cost, and in `seconds` how long its request took, work included.

    Args:
        url: of the service, as in "http://127.0.0.1:8000".
        budget: how many queries may be asked; None for no limit.
        most_bits: the hardest puzzle that is solved (2^most_bits hashes on average).
        patience: seconds to go on asking a busy service, and to wait for any answer.
        api_key: names the account, for a service that goes by accounts.

    Raises:
        RemoteError: there is no such service.
        ValueError: a budget below 1.
    """

    def __init__(
        self,
        url: str,
        budget: int | None = None,
        most_bits: int = 24,
        patience: float = 30.0,
        api_key: str | None = None,
    ):
        self.most_bits, self.patience = most_bits, patience
        # A connection that rested for as long as the service keeps it might be closed while a request is on its way.
        resting = httpx.Limits(keepalive_expiry=2.0)
        proxied = httpx.URL(url).host not in LOOPBACK  # HTTP_PROXY and its kin are for other machines
        headers = {} if api_key is None else {API_KEY: api_key}
        self._http = httpx.Client(base_url=url, timeout=patience, limits=resting, trust_env=proxied, headers=headers)
        model = self._sent("GET", "/v1/model")
        try:
            shape, classes, self.most_images = model["image_shape"], model["classes"], model["most_images"]
        except (KeyError, TypeError) as error:
            raise RemoteError(f"what answers at {url} is no service of samelib") from error
        super().__init__(shape, classes, budget)

    def query(self, x: Tensor) -> Tensor:
        """As every gateway's; in parts that the service takes, each logged when it is answered.

        Raises:
            RemoteError: the service failed or refused the request (not: the query).
            ValueError: it asks for more work than `most_bits`.
        """
        x = check_queries(x, self.image_shape)
        if len(x) > self.remaining:
            raise BudgetExceeded(f"{len(x)} asked, {self.remaining} of {self.budget} queries left; send fewer")
        return torch.cat([super(RemoteGateway, self).query(part) for part in x.split(self.most_images)])

    def quote(self, x: Tensor) -> Tensor:
        """As every gateway's: the bits of the challenges; an answer that costs nothing comes along and is thrown away."""
        images = to_uint8(check_queries(x, self.image_shape)).cpu()
        results = [result for part in images.split(self.most_images) for result in self._predict(part, [])]
        return torch.tensor([result.get("bits", 0) for result in results])

    def _ask(self, x: Tensor) -> dict[str, Tensor]:
        start, images = time.perf_counter(), to_uint8(x).cpu()
        results, hashes = self._predict(images, []), torch.zeros(len(x), dtype=torch.int64)
        unpaid = [index for index, result in enumerate(results) if result["status"] == "challenge"]
        if unpaid:
            solved = [solve(results[index]["challenge"], self.most_bits) for index in unpaid]
            hashes[unpaid] = torch.tensor([work for _, work in solved])
            answered = self._predict(images[unpaid], [stamp for stamp, _ in solved])
            for index, result in zip(unpaid, answered, strict=True):
                results[index] = result
        nothing = [torch.nan] * self.classes
        answers = torch.tensor([result.get("probabilities") or nothing for result in results])
        seconds = torch.full([len(x)], time.perf_counter() - start, dtype=torch.float64)
        records = {"queries": images, "answers": answers, "refused": answers.isnan().any(1)}
        return records | {"hashes": hashes, "seconds": seconds}

    def _predict(self, images: Tensor, stamps: Sequence[str]) -> list[dict]:
        files = [("image", ("image.png", as_png(image), "image/png")) for image in images]
        try:
            return self._sent("POST", "/v1/predict", files=files, data={"stamp": list(stamps)})["results"]
        except Banned:
            return [{"status": "refused"}] * len(images)

    def _sent(self, method: str, path: str, **content) -> dict:
        """The JSON of a good answer; a busy service is asked again until the patience ends."""
        end = time.monotonic() + self.patience
        while True:
            try:
                answer = self._http.request(method, path, **content)
            except httpx.HTTPError as error:
                raise RemoteError(f"no answer from {self._http.base_url}: {error or type(error).__name__}") from error
            pause = _pause(answer)
            if answer.status_code not in BUSY or time.monotonic() + pause > end:
                break
            time.sleep(pause)
        if answer.status_code != 200:
            kind = Banned if answer.status_code == 403 and _said(answer, "code") == "banned" else RemoteError
            reason = _said(answer, "error") or answer.text[:200]
            raise kind(f"{self._http.base_url} refused the request ({answer.status_code}): {reason}")
        try:
            return answer.json()
        except ValueError as error:
            raise RemoteError(f"what answers at {self._http.base_url} is no service of samelib") from error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "RemoteGateway":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _pause(answer: httpx.Response) -> int:
    """Seconds that a busy service asks to wait; 1 where it says nothing, or a date."""
    said = answer.headers.get("retry-after", "")
    return int(said) if said.isdecimal() and len(said) < 10 else 1


def _said(answer: httpx.Response, name: str) -> str:
    """What a refusal of a service says under that name; nothing where it is no such refusal."""
    try:
        return str(answer.json()[name])
    except (ValueError, KeyError, TypeError):
        return ""
