"""What the OpenAPI page says of the service. Bodies are read by intake.py, not by pydantic: its report of a wrong array
has a line for every element."""

from typing import Literal

from pydantic import BaseModel, Field

from samelib.models.classifiers import Victim
from samelib.service.intake import Limits

DESCRIPTION = """\
Send images, get the probabilities of the classes. The service may answer a strange image with `refused`; or any image with
a `challenge`, a proof of work: find a whole number such that SHA-256 of the text CHALLENGE.NUMBER (challenge, dot, decimal
number) begins with `bits` zero bits, and send the image again with that text as its stamp.
A stamp is good once, for that image, for a few minutes. `samelib.service.client.RemoteGateway` does all this.
"""


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


class Fault(BaseModel):
    """A word for programs, a sentence for people, and which image it is about, where it is about one."""

    code: str
    message: str
    image: int | None = None


class Error(BaseModel):
    error: Fault


_ERRORS = {
    400: "The body cannot be read",
    403: "A stamp is refused: malformed, forged, expired, mismatched, unsolved or spent",
    408: "The body came too slowly",
    413: "Too many bytes or images",
    415: "Another media type",
    422: "The images are not what the service takes",
    429: "Too many images are waiting; Retry-After says for how many seconds",
    500: "A fault of the service",
    503: "Too many connections or spent stamps",
    504: "The answer took too long",
}


def predict(victim: Victim, limits: Limits) -> dict:
    """The arguments that describe POST /v1/predict to FastAPI."""
    nested = {"type": "integer", "minimum": 0, "maximum": 255, "description": "written without a decimal point"}
    for size in reversed(victim.image_shape):
        nested = {"type": "array", "items": nested, "minItems": size, "maxItems": size}
    several = {"minItems": 1, "maxItems": limits.images}
    stamp = {"type": "string", "description": "the challenge, a dot and a decimal number; empty for none"}
    or_null = stamp | {"type": ["string", "null"]}
    as_json = {
        "type": "object",
        "required": ["images"],
        "additionalProperties": False,
        "properties": {
            "images": {"type": "array", "items": nested} | several,
            "stamps": {"type": "array", "items": or_null, "maxItems": limits.images},
        },
    }
    as_form = {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {"type": "array", "items": {"type": "string", "format": "binary"}} | several,
            "stamp": {"type": "array", "items": stamp, "maxItems": limits.images},
        },
    }
    content = {"application/json": {"schema": as_json}, "multipart/form-data": {"schema": as_form}}
    return {
        "summary": "Probabilities of the classes for one image or several",
        "response_model": Results,
        "responses": {status: {"model": Error, "description": words} for status, words in _ERRORS.items()},
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }
