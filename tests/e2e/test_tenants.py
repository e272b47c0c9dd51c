"""Two tenants over real HTTP: the same names, nothing in common."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import tenora_client as tc
from tests.e2e.material import ask, write_adapter, write_rows
from tests.e2e.serving import Server
from tests.support.patience import PATIENCE

SCOPES = ("infer", "train", "adapters")


@dataclass
class Tenant:
    """A tenant with all that it owns."""

    client: tc.Client
    raw: httpx.Client
    file: tc.File
    job: tc.Job
    said: str


@pytest.fixture(scope="module")
def tenants(
    server: Server, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tenant, Tenant]]:
    """Two tenants that each have a file, a job and an adapter, called the same."""
    directory = tmp_path_factory.mktemp("tenants")
    with ExitStack() as stack:
        made = []
        for number, name in enumerate(("acme", "globex")):
            server.command("tenants", "create", name)
            key = server.new_key(name, *SCOPES)
            client, raw = stack.enter_context(server.client(key)), stack.enter_context(server.raw(key))
            client.adapters.import_("desk", write_adapter(directory / name, tiny_base, seed=100 + number))
            source = write_rows(directory / "rows.jsonl", 8, reply=f"{name} {{}}")
            file = client.files.upload(source)
            job = client.jobs.create(file, name="trained", hyperparameters={"n_epochs": 1}).wait(poll=0.2)
            said = client.chat.create(ask("Question 1?"), "desk", temperature=0.0, max_tokens=24, ignore_eos=True).text
            made.append(Tenant(client, raw, file, job, said))
        yield made[0], made[1]


def test_the_same_name_is_two_adapters(tenants: tuple[Tenant, Tenant]) -> None:
    ours, theirs = tenants
    assert ours.said != theirs.said
    first, second = ours.client.adapters.get("desk"), theirs.client.adapters.get("desk")
    assert (first.tenant, second.tenant) == ("acme", "globex")
    assert first.digest != second.digest


def test_listings_hold_ones_own_alone(tenants: tuple[Tenant, Tenant]) -> None:
    for me, other in (tenants, tenants[::-1]):
        assert {adapter.name for adapter in me.client.adapters.list()} == {"desk", "trained"}
        assert {adapter.tenant for adapter in me.client.adapters.list()} == {me.client.adapters.get("desk").tenant}
        files = {file.id for file in me.client.files.list()}
        assert me.file.id in files
        assert other.file.id not in files
        assert [job.id for job in me.client.jobs.list()] == [me.job.id]
        models = {model.id for model in me.client.models.list()}
        assert {"desk", "trained"} <= models
        assert other.job.fine_tuned_model not in models


def foreign_paths(owner: Tenant) -> list[tuple[str, str, str]]:
    """(method, path, what names the thing) of everything that the owner has and that has a path."""
    file, job, model = owner.file.id, owner.job.id, owner.job.fine_tuned_model or ""
    jobs = f"/v1/fine_tuning/jobs/{job}"
    return [
        ("GET", f"/v1/files/{file}", file),
        ("DELETE", f"/v1/files/{file}", file),
        ("GET", f"/v1/files/{file}/content", file),
        ("GET", jobs, job),
        ("GET", f"{jobs}/events", job),
        ("GET", f"{jobs}/checkpoints", job),
        ("POST", f"{jobs}/cancel", job),
        ("POST", f"{jobs}/pause", job),
        ("POST", f"{jobs}/resume", job),
        ("GET", f"/v1/models/{model}", model),
        ("DELETE", f"/v1/models/{model}", model),
        ("GET", "/v1/models/acme%2Fdesk", "acme/desk"),
        ("DELETE", "/v1/models/acme%2Fdesk", "acme/desk"),
        ("GET", "/v1/adapters/acme%2Fdesk", "acme/desk"),
        ("DELETE", "/v1/adapters/acme%2Fdesk", "acme/desk"),
        ("GET", "/v1/adapters/acme%2Fdesk/versions", "acme/desk"),
        ("GET", "/v1/adapters/acme%2Fdesk/download", "acme/desk"),
        ("POST", "/v1/adapters/acme%2Fdesk/pin", "acme/desk"),
    ]


def varied(text: str) -> str:
    """A name of the same form that names nothing."""
    return text[:-1] + ("0" if text[-1] != "0" else "1")


def test_anothers_thing_and_a_missing_thing_are_one_404(tenants: tuple[Tenant, Tenant]) -> None:
    owner, stranger = tenants
    for method, path, name in foreign_paths(owner):
        missing = varied(name)
        quoted, absent = (text.replace("/", "%2F") for text in (name, missing))
        foreign = stranger.raw.request(method, path)
        nothing = stranger.raw.request(method, path.replace(quoted, absent))
        assert foreign.status_code == nothing.status_code == 404, (method, path, foreign.text)
        assert foreign.text.replace(name, "X") == nothing.text.replace(missing, "X"), (method, path)
        assert differing_headers(foreign, nothing) <= {"date", "x-request-id"}, (method, path)
    assert owner.client.files.get(owner.file.id).id == owner.file.id
    assert owner.client.adapters.get("desk").name == "desk"


def test_a_name_answers_the_same_bytes_before_and_after_another_tenant_takes_it(
    tenants: tuple[Tenant, Tenant], tiny_base: Path, tmp_path: Path
) -> None:
    owner, stranger = tenants

    def asked() -> list[bytes]:
        body = {"messages": ask("Hello"), "model": "acme/private"}
        by_id = {"messages": ask("Hello"), "adapter_id": "acme/private"}
        text = {"prompt": "Hello", "model": "private"}
        calls = [("/v1/chat/completions", body), ("/v1/chat/completions", by_id), ("/v1/completions", text)]
        responses = [stranger.raw.post(path, json=content) for path, content in calls]
        assert {response.status_code for response in responses} == {404}
        return [response.content for response in responses]

    before = asked()
    owner.client.adapters.import_("private", write_adapter(tmp_path / "private", tiny_base, seed=7))
    assert owner.client.chat.create(ask("Hello"), "private", max_tokens=2).model == "private"
    assert asked() == before
    owner.client.adapters.delete("private")


def test_a_foreign_file_cannot_be_trained_on(tenants: tuple[Tenant, Tenant]) -> None:
    owner, stranger = tenants
    answers = []
    for name in (owner.file.id, varied(owner.file.id)):
        with pytest.raises(tc.StatusError) as raised:
            stranger.client.jobs.create(name)
        answers.append((raised.value.status_code, raised.value.code, raised.value.message.replace(name, "X")))
    assert answers[0] == answers[1]


def test_prefixes_are_cached_per_tenant(tenants: tuple[Tenant, Tenant]) -> None:
    """The same long prompt to the base: a tenant meets its own cached prefix and never the other's."""
    question = f"Prefix {time.monotonic_ns()}: " + "the quick brown fox jumps over the lazy dog. " * 4

    def cached(tenant: Tenant) -> int:
        usage = tenant.client.chat.create(ask(question), tenant.client.models.base().id, max_tokens=1).usage
        assert usage is not None
        details = (usage.model_extra or {}).get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    ours, theirs = tenants
    assert cached(ours) == 0
    assert cached(ours) > 0
    assert cached(theirs) == 0
    assert cached(theirs) > 0


def test_scopes_bound_what_a_key_may_do(server: Server, tenants: tuple[Tenant, Tenant]) -> None:
    with server.client(server.new_key("acme", "infer")) as client:
        assert client.chat.create(ask("Hello"), "desk", max_tokens=1).model == "desk"
        for forbidden in (
            lambda: client.adapters.delete("desk"),
            lambda: client.jobs.create("file-x"),
            lambda: list(client.files.list()),
        ):
            with pytest.raises(tc.PermissionDeniedError):
                forbidden()
    assert tenants[0].client.adapters.get("desk").name == "desk"


def test_a_revoked_key_stops_working(server: Server, tenants: tuple[Tenant, Tenant]) -> None:
    key = server.new_key("acme", "infer")
    listed = server.command("keys", "list", "--tenant", "acme")
    assert key not in listed
    with server.client(key) as client:
        assert list(client.models.list())
        row = next(line for line in listed.splitlines() if key.split("-")[1] in line.split())
        identity = row.split()[0]
        server.command("keys", "revoke", "--tenant", "acme", identity)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                list(client.models.list())
            except tc.AuthenticationError:
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)


def differing_headers(one: httpx.Response, other: httpx.Response) -> set[str]:
    """Names of the headers in which two answers differ; lengths follow from the names in the messages."""
    names = {*one.headers, *other.headers} - {"content-length"}
    return {name for name in names if one.headers.get(name) != other.headers.get(name)}
