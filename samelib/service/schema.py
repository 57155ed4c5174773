"""The bodies of /v1: forms of image files in, JSON out. FastAPI checks and documents them."""

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

DESCRIPTION = """\
Send images, get the probabilities of the classes: image files to `/v1/predict`, or tensors by the Open Inference Protocol
to `/v2`. The service may answer a strange image with `refused`; or any image with a `challenge`, a proof of work: find a
whole number such that SHA-256 of the text CHALLENGE.NUMBER (challenge, dot, decimal number) begins with `bits` zero bits,
and send the image again with that text as its stamp. A stamp is good once, for that image, for a few minutes.
A service that goes by accounts wants your API key in the header `X-API-Key`.
`samelib.service.client.RemoteGateway` does all this.
"""


def image_form(most_images: int) -> type[BaseModel]:
    """The form of POST /v1/predict, of at most that many images."""

    class ImageForm(BaseModel):
        """PNG or JPEG files of the model's size, 8 bits a channel; and a stamp for each, or none at all."""

        model_config = ConfigDict(extra="forbid")
        image: Annotated[list[UploadFile], Field(min_length=1, max_length=most_images)]
        stamp: Annotated[list[str], Field(description="CHALLENGE.NUMBER; empty for an image without")] = []

    return ImageForm


class Model(BaseModel):
    """What the service takes: images of shape [C, H, W], at most `most_images` a request; and how many classes it names."""

    image_shape: list[int] = Field(min_length=3, max_length=3)  # a tuple comes out as OpenAPI 3.1 does not have it
    classes: int
    most_images: int


class Result(BaseModel):
    """What became of one image: probabilities where it was answered; where it has to be worked for, a challenge, and with
    how many zero bits the digest of its stamp must begin."""

    status: Literal["answered", "refused", "challenge"]
    probabilities: list[float] | None = None
    challenge: str | None = None
    bits: int | None = None


class Results(BaseModel):
    """One result for each image, in their order."""

    results: list[Result]


class Error(BaseModel):
    """A sentence for people, a word for programs, and which image it is about, where it is about one."""

    error: str
    code: str
    image: int | None = None


_ERRORS = {
    400: "The body, or the API key, cannot be read",
    401: "There is no API key, and the service goes by accounts",
    403: "A stamp is refused: malformed, forged, expired, mismatched, unsolved or spent; or the account is banned",
    408: "The body came too slowly",
    413: "Too many bytes",
    422: "The body is not what the service takes",
    429: "Too many images are waiting; Retry-After says for how many seconds",
    500: "A fault of the service",
    503: "Too many connections, spent stamps or accounts",
    504: "The answer took too long",
}
ERRORS = {status: {"model": Error, "description": words} for status, words in _ERRORS.items()}
