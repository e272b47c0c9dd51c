"""The OpenAPI document says what is answered: to thousands of requests that schemathesis makes from it."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as how
from hypothesis.errors import Unsatisfiable
from requests import PreparedRequest
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

# The same service as the API's tests use.
from tests.api.conftest import (  # noqa: F401
    Service,
    import_adapter,
    make_adapter,
    script,
    service,
    settings,
    upload,
)
from tests.cli.served import served
from tests.support.patience import PATIENCE

CASES = 5000
EACH = 85  # of an operation, with data that fits the document, and as many that does not
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_every_operation_tells_its_errors_and_its_key(service: Service) -> None:  # noqa: F811
    document = service.app.openapi()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"key": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            is_open = path in {"/livez", "/readyz"}
            assert (operation.get("security") == []) is is_open, where
            assert ("401" in operation["responses"]) is not is_open, where
            for status, response in operation["responses"].items():
                if int(status) >= 400 and not (status == "503" and path in {"/livez", "/readyz", "/health"}):
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Error"}, f"{where} {status}"
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_what_waits_in_a_queue_and_what_writes_says_so(service: Service) -> None:  # noqa: F811
    paths = service.app.openapi()["paths"]
    queued = ("/v1/files", "/v1/files/{file_id}/preview", "/v1/fine_tuning/estimate", "/v1/chat/completions")
    for path in (*queued, "/v1/embeddings", "/classify", "/pooling", "/v1/rewards"):
        assert "429" in paths[path]["post"]["responses"], path
    assert "507" in paths["/v1/adapters/{name}/download"]["get"]["responses"]


class Requests:
    """Sends what is made from the document and keeps what was not as it says.

    Attributes:
        sent: by the status of the answer.
        wrong: what was wrong, by operation.
    """

    def __init__(self, url: str, key: str, names: Mapping[str, str]) -> None:
        self.url = url
        self.key = key
        self.names = names
        self.sent: Counter[int] = Counter()
        self.wrong: dict[str, str] = {}

    def run(self, document: dict[str, Any]) -> None:
        schema = schemathesis.openapi.from_dict(document)
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                with contextlib.suppress(Unsatisfiable):  # who takes nothing can be sent nothing wrong
                    self._each(operation, operation.as_strategy(generation_mode=mode), EACH)

    def _authorize(self, request: PreparedRequest) -> PreparedRequest:
        request.headers["authorization"] = f"Bearer {self.key}"
        return request

    def _each(self, operation: APIOperation, strategy: Any, count: int) -> None:
        @how(
            max_examples=count,
            database=None,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def send(case: Case) -> None:
            self._send(operation, case)

        send()

    def _send(self, operation: APIOperation, case: Case) -> None:
        # Every other request names what there is: a name made up is a 404 and tells little.
        if self.sent.total() % 2:
            for name in case.path_parameters or {}:
                case.path_parameters[name] = self.names[name]
        # The last word is ours: a key that is made up would be a 401 and tell nothing of what lies behind it.
        response = case.call(base_url=self.url, auth=self._authorize, timeout=PATIENCE)
        self.sent[response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except (Failure, FailureGroup) as failure:
            self.wrong.setdefault(f"{operation.label} {response.status_code}", str(failure)[:1500])


@pytest.mark.full
@pytest.mark.timeout(3600)
async def test_thousands_of_requests_get_what_the_document_says(
    service: Service,  # noqa: F811
    make_adapter: Callable[..., Path],  # noqa: F811
) -> None:
    client = service.client()
    file = (await upload(client)).json()["id"]
    job = {"model": service.control.inference.base_id, "training_file": file}
    assert (await client.post("/v1/admin/tenants", json={"name": "umbrella"})).status_code in {200, 201, 409}
    names = {
        "file_id": file,
        "job_id": (await client.post("/v1/fine_tuning/jobs", json=job)).json()["id"],
        "name": "fox",
        "model": service.control.inference.base_id,
        "tenant": "umbrella",
        "key_id": (await client.post("/v1/admin/tenants/umbrella/keys", json={"scopes": ["infer"]})).json()["id"],
    }
    assert (await import_adapter(client, "fox", make_adapter(0))).status_code == 201
    async with served(service) as port:
        requests = Requests(port.url, service.keys["default"]["admin"], names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the generators
            await asyncio.to_thread(requests.run, service.app.openapi())
    print(f"{requests.sent.total()} requests: {dict(sorted(requests.sent.items()))}")
    assert requests.wrong == {}
    assert requests.sent.total() - requests.sent[401] >= CASES
