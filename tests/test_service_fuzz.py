"""Requests drawn from the OpenAPI description, good ones and bad ones: no 500, and every answer is as described."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from serving import WORK, Ranked

from samelib.models.classifiers import Victim
from samelib.responses import Reject
from samelib.service.app import create_app
from samelib.service.intake import Limits

SMALL = (1, 2, 3)
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module", params=[Reject(0.05), WORK], ids=["reject", "proof of work"])
def described(request):
    victim = Victim(lambda x: x.flatten(1)[:, :4].softmax(1), SMALL, 4)
    return schemathesis.openapi.from_asgi(
        "/openapi.json", create_app(victim, Ranked(), request.param, limits=Limits(images=3))
    )


def fuzz(operation, mode: GenerationMode, examples: int) -> set[tuple[str | None, int]]:
    """Draws requests, checks their answers, and returns which media types they had, each with its status."""
    seen = set()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        response = case.call()
        status = response.status_code
        refusal = [] if status == 413 else [checks.negative_data_rejection]  # it takes 413 for no refusal
        case.validate_response(response, checks=CHECKS + refusal)
        if mode is GenerationMode.POSITIVE and case.media_type == "application/json" and set(case.body) == {"images"}:
            assert status == (422 if ".0" in json.dumps(case.body) else 200)  # 7.0 is an integer to OpenAPI, not to us
        seen.add((case.media_type, status))

    check()
    return seen


def test_good_requests_are_answered(described):
    for path, operation in ((o.ok().path, o.ok()) for o in described.get_all_operations()):
        seen = fuzz(operation, GenerationMode.POSITIVE, 60 if path == "/v1/predict" else 3)
        assert 200 in {status for _, status in seen}, path


def test_bad_requests_are_refused(described):
    seen = fuzz(described["/v1/predict"]["POST"], GenerationMode.NEGATIVE, 80)
    assert seen >= {("application/json", 422), ("multipart/form-data", 422)}
