"""POST /v1/files/{id}/preview: what the model would see of a training file."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import TRAINING_ROWS, Service, upload


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


async def preview(client: httpx.AsyncClient, content: str, **body: Any) -> dict[str, Any]:
    file = (await upload(client, content)).json()
    answer = await client.post(f"/v1/files/{file['id']}/preview", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert (found["object"], found["file_id"]) == ("file.preview", file["id"])
    return found


async def test_rows_are_shown_as_the_model_sees_them(service: Service) -> None:
    found = await preview(service.client("train"), TRAINING_ROWS, limit=2)
    assert (found["format"], found["has_more"], found["last_line"]) == ("chat", True, 2)
    row = found["data"][0]
    assert row["spans"] == [
        {"text": "<|im_start|>user\nDefine: fox.<|im_end|>\n<|im_start|>assistant\n", "trained": False},
        {"text": "A quick one.<|im_end|>", "trained": True},
        {"text": "\n", "trained": False},
    ]
    assert (row["line"], row["part"], row["truncated"], row["truncated_tokens"], row["issues"]) == (
        1,
        None,
        False,
        0,
        [],
    )
    assert 0 < row["trained_tokens"] < row["tokens"]
    totals = {"rows": 2, "tokens": 2 * row["tokens"], "trained_tokens": 2 * row["trained_tokens"]}
    assert found["totals"] == {**totals, "truncated": 0, "unusable": 0}


async def test_pages_go_on_after_the_last_line(service: Service) -> None:
    content = lines(*(f'{{"text": "row {number}"}}' if number % 2 else "" for number in range(1, 10)))
    client, seen, after = service.client("train"), [], 0
    file = (await upload(client, content)).json()["id"]
    while True:
        page = (await client.post(f"/v1/files/{file}/preview", json={"limit": 2, "after": after})).json()
        seen += [(row["line"], row["spans"][-1]["text"]) for row in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_line"]
    assert [line for line, _ in seen] == [1, 3, 5, 7, 9]
    beyond = (await client.post(f"/v1/files/{file}/preview", json={"after": 9})).json()
    assert (beyond["data"], beyond["last_line"], beyond["totals"]["rows"]) == ([], None, 0)
    assert beyond["format"] == "text"


async def test_a_file_with_errors_can_be_previewed(service: Service) -> None:
    good = {"prompt": "a", "completion": " b"}
    found = await preview(service.client("train"), lines(good, "{oops", {"prompt": "a"}, good))
    assert [row["line"] for row in found["data"]] == [1, 2, 3, 4]
    assert [[issue["code"] for issue in row["issues"]] for row in found["data"]] == [
        [],
        ["bad_json"],
        ["missing_content"],
        [],
    ]
    assert found["data"][1]["tokens"] == 0
    assert (found["totals"]["unusable"], found["totals"]["rows"], found["format"]) == (2, 4, "prompt_completion")


async def test_a_labelled_row_is_shown_with_its_label_and_without_the_place_where_a_head_reads(
    service: Service,
) -> None:
    rows = lines({"text": "abc", "label": ["b", "a"]}, {"text": "abc", "label": ["a"]})
    found = await preview(service.client("train"), rows)
    row = found["data"][0]
    assert (found["format"], row["label"], row["trained_tokens"]) == ("labelled_text", ["b", "a"], 0)
    assert row["spans"] == [{"text": "abc", "trained": False}]


async def test_truncation_is_shown_before_it_happens(service: Service) -> None:
    client = service.client("train")
    content = lines({"prompt": "abc ", "completion": "x" * 60}, {"prompt": "abc ", "completion": "d"})
    refused = (await preview(client, content, max_seq_length=20))["data"]
    assert [issue["code"] for issue in refused[0]["issues"]] == ["too_long"]
    assert (refused[0]["truncated"], refused[1]["issues"]) == (False, [])
    cut = await preview(client, content, max_seq_length=20, truncate=True)
    row = cut["data"][0]
    assert (row["tokens"], row["truncated"], row["issues"]) == (20, True, [])
    assert row["truncated_tokens"] == refused[0]["tokens"] - 20
    assert cut["totals"]["truncated"] == 1
    assert "".join(span["text"] for span in refused[0]["spans"]).startswith("".join(s["text"] for s in row["spans"]))


async def test_both_answers_of_a_preference_are_shown(service: Service) -> None:
    row = {"prompt": "Why? ", "chosen": "So.", "rejected": "Because."}
    found = await preview(service.client("train"), lines(row, row))
    assert [(one["line"], one["part"]) for one in found["data"]] == [
        (1, "chosen"),
        (1, "rejected"),
        (2, "chosen"),
        (2, "rejected"),
    ]
    assert [one["spans"][1]["text"][:3] for one in found["data"][:2]] == ["So.", "Bec"]
    assert (found["format"], found["totals"]["rows"]) == ("trl_preference", 2)


async def test_no_body_is_the_defaults(service: Service) -> None:
    client = service.client("train")
    file = (await upload(client)).json()["id"]
    assert len((await client.post(f"/v1/files/{file}/preview")).json()["data"]) == 10


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"after": -1}, "after"),
        ({"max_seq_length": 7}, "max_seq_length"),
        ({"max_seq_length": 513}, "max_seq_length"),  # beyond the context
        ({"truncate": "yes"}, "truncate"),
        ({"rows": 3}, "rows"),
    ],
)
async def test_fields_out_of_bounds_are_named(service: Service, body: dict[str, Any], param: str) -> None:
    client = service.client("train")
    file = (await upload(client)).json()["id"]
    answer = await client.post(f"/v1/files/{file}/preview", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_only_training_files_of_the_tenant_itself(service: Service) -> None:
    client = service.client("train")
    other = (await upload(client, purpose="user_data")).json()["id"]
    refused = await client.post(f"/v1/files/{other}/preview", json={})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file_id")
    file = (await upload(client)).json()["id"]
    assert (await service.client("infer").post(f"/v1/files/{file}/preview", json={})).status_code == 403
    stranger = service.client("train", tenant="other")
    assert (await stranger.post(f"/v1/files/{file}/preview", json={})).status_code == 404
