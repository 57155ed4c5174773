"""Requests drawn from the OpenAPI description, good ones and bad ones: no 500, and every answer is as described."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from serving import WORK, Ranked

from samelib.models.classifiers import Victim
from samelib.responses import BanAccount, Reject
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


@pytest.fixture(scope="module", params=[Reject(0.05), WORK, BanAccount()], ids=["reject", "proof of work", "ban"])
def described(request):
    victim = Victim(lambda x: x.flatten(1)[:, :4].softmax(1), SMALL, 4)
    return schemathesis.openapi.from_asgi(
        "/openapi.json", create_app(victim, Ranked(SMALL), request.param, limits=Limits(images=3))
    )


def fuzz(operation, mode: GenerationMode, examples: int) -> set[int]:
    """Draws requests, checks their answers, and returns the statuses that they had."""
    statuses = set()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    check()
    return statuses


# What images must be, beyond any schema, tests/test_service_images.py and tests/test_service_tensors.py have.
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_described(described, mode):
    for operation in (result.ok() for result in described.get_all_operations()):
        posted = operation.method.upper() == "POST"
        if posted or mode is GenerationMode.POSITIVE:
            statuses = fuzz(operation, mode, 60 if posted else 3)
            assert (422 if posted else 200) in statuses and not (posted and statuses & {404, 405, 500})
