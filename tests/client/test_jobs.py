"""Waiting for a job, and what is drawn meanwhile."""

from __future__ import annotations

import io
from collections.abc import Sequence

import httpx
import pytest

import tenora_client as tc
from tenora_client.watching import Watch
from tests.client.fake import Script, event, failure, job, page, reply


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class View:
    """Keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, list[str]]] = []
        self.closed = False

    def show(self, job: tc.JobState, events: Sequence[tc.JobEvent]) -> None:
        self.shown.append((job.status, [item.id for item in events]))

    def close(self) -> None:
        self.closed = True


def test_wait_shows_every_event_once_and_in_order() -> None:
    script = Script(
        reply(job("queued")),
        reply(page(event(1))),
        reply(job("running")),
        reply(page(event(4), event(3), has_more=True)),  # newest first, two pages
        reply(page(event(2), event(1))),
        reply(job("succeeded")),
        reply(page(event(5), event(4))),
    )
    view = View()
    with script.client() as client:
        done = client.jobs.wait("ftjob-1", progress=view, poll=0.25)
    assert done.status == "succeeded"
    assert view.shown == [
        ("queued", ["ftevent-1"]),
        ("running", ["ftevent-2", "ftevent-3", "ftevent-4"]),
        ("succeeded", ["ftevent-5"]),
    ]
    assert script.slept == [0.25, 0.25]
    assert view.closed


def test_wait_without_progress_reads_no_events() -> None:
    script = Script(reply(job("queued")), reply(job("running")), reply(job("succeeded")))
    with script.client() as client:
        assert client.jobs.get("ftjob-1").wait().finished
    assert all(not request.url.path.endswith("events") for request in script.requests)


@pytest.mark.parametrize(
    ("final", "text"),
    [
        (
            job("failed", error={"code": "invalid_training_file", "message": "Line 3 has no messages.", "param": None}),
            "Line 3",
        ),
        (job("failed"), "no reason"),
        (job("cancelled"), "cancelled"),
    ],
)
def test_a_job_that_ends_without_an_adapter_is_an_error(final: dict[str, object], text: str) -> None:
    with Script(reply(final)).client() as client, pytest.raises(tc.JobError, match=text) as raised:
        client.jobs.wait("ftjob-1")
    assert raised.value.job.status == final["status"]


def test_wait_lives_through_a_restart_of_the_server_but_not_through_other_errors() -> None:
    once = tc.RetryPolicy(max_retries=0)
    script = Script(reply(job("running")), httpx.ConnectError("refused"), failure(503), reply(job("succeeded")))
    with script.client(retries=once) as client:
        assert client.jobs.wait("ftjob-1").status == "succeeded"
    with Script(failure(404)).client(retries=once) as client, pytest.raises(tc.NotFoundError):
        client.jobs.wait("ftjob-1")


def test_patience_ends() -> None:
    now = iter(range(0, 1000, 25))
    watch = Watch(None, clock=lambda: float(next(now)))
    error = tc.TransportError("gone", sent=False)
    for _ in range(3):
        watch.endure(error)  # 0, 25 and 50 seconds of silence
    with pytest.raises(tc.TransportError):
        watch.endure(error)
    watch.heard()
    watch.endure(error)


def test_a_timeout_stops_the_waiting_only() -> None:
    with Script(reply(job("running"))).client() as client, pytest.raises(tc.JobError, match="still running"):
        client.jobs.wait("ftjob-1", timeout=-1.0)


async def test_the_async_client_waits_likewise() -> None:
    script = Script(
        reply(job("running")), reply(page(event(1))), reply(job("succeeded")), reply(page(event(2), event(1)))
    )
    view = View()
    async with script.async_client() as client:
        assert (await client.jobs.wait("ftjob-1", progress=view)).status == "succeeded"
    assert view.shown == [("running", ["ftevent-1"]), ("succeeded", ["ftevent-2"])]


def states(*statuses: str) -> list[tc.JobState]:
    return [tc.JobState.model_validate(job(status)) for status in statuses]


def events(*items: dict[str, object]) -> list[tc.JobEvent]:
    return [tc.JobEvent.model_validate(item) for item in items]


def test_the_bar_of_a_job_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out, now = Terminal(), [100.0]
    bar = tc.JobBar(out, clock=lambda: now[0])
    queued, running, done = states("queued", "running", "succeeded")
    bar.show(queued, [])
    bar.show(running, events(event(1, step=1, total_steps=12, train_loss=3.25, tokens_per_second=271.0)))
    now[0] = 110.0
    bar.show(running, events(event(2, "warn", valid_loss=2.875), event(3, step=6, total_steps=12, train_loss=2.5)))
    bar.show(done, [])
    bar.close()
    text = out.getvalue()
    assert "queued" in text
    assert "step 1/12  loss 3.250  271 tok/s" in text
    assert "\nwarn: event 2\n" in text.replace("\r", "\n").replace("\x1b[K", "")
    assert "[############------------] step 6/12  loss 2.500  held-out 2.875  271 tok/s  ETA 0:12" in text
    assert "succeeded  step 12/12" in text
    assert text.endswith("\n")


def test_the_bar_of_a_sweep_counts_its_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    bar = tc.JobBar(out, clock=lambda: 0.0)
    stand = (("queued", None), ("running", 2.5), ("stopped", 3.0), ("failed", None))
    trials = [{"trial": n, "status": status, "valid_loss": loss} for n, (status, loss) in enumerate(stand)]
    running = tc.JobState.model_validate(job("running", sweep_results=trials))
    bar.show(running, events(event(1, trial=1, step=5, total_steps=9)))
    bar.close()
    assert "[############------------] trials 2/4 over  best held-out 2.500" in out.getvalue()
    assert "step" not in out.getvalue()


def test_the_bar_of_a_cross_validation_tells_how_far_its_folds_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    bar = tc.JobBar(out, clock=lambda: 0.0)
    (running,) = states("running")
    bar.show(running, events(event(1, fold=0, fold_step=3, fold_valid_loss=2.5, folds_done=0.25)))
    assert "[######------------------] cross-validation 25%" in out.getvalue()
    bar.show(running, events(event(2, step=1, total_steps=4)))
    bar.close()
    assert "step 1/4" in out.getvalue()


def test_the_bar_of_a_job_in_a_log_is_a_few_whole_lines() -> None:
    out = io.StringIO()
    bar = tc.JobBar(out, clock=lambda: 0.0)
    (running,) = states("running")
    for step in range(1, 101):
        bar.show(running, events(event(step, step=step, total_steps=100)))
    bar.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 11
    assert not any(ord(char) < 32 for line in lines for char in line)


def test_a_bar_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    out = Terminal()
    with tc.Bar("uploading", out) as bar:
        bar.draw(1, 2, "x" * 100)
    assert len(out.getvalue().removeprefix("\r").partition("\x1b")[0]) == 29
