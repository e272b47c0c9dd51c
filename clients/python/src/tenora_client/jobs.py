# Made of async_jobs.py by scripts/unasync.py (`make client`): change that one.
"""Fine-tuning jobs of the synchronous client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, Unpack

from pydantic import PrivateAttr, TypeAdapter

from tenora_client import calls
from tenora_client.connection import Connection
from tenora_client.errors import TenoraError
from tenora_client.models import Checkpoint, Estimate, File, JobEvent, JobState, ListPage
from tenora_client.paging import Pages
from tenora_client.params import JobParams
from tenora_client.progress import JobBar
from tenora_client.resources import Models
from tenora_client.watching import JobView, Watch


class Job(JobState):
    """A job as it was when it was fetched, with what can be done about it."""

    _jobs: Jobs = PrivateAttr()

    def bind(self, jobs: Jobs) -> Self:
        """Remember where the job came from."""
        self._jobs = jobs
        return self

    def refresh(self) -> Job:
        """The job as it is now."""
        return self._jobs.get(self.id)

    def cancel(self) -> Job:
        """End the job without a result."""
        return self._jobs.cancel(self.id)

    def pause(self) -> Job:
        """Keep the job's state and give its place to others, until `resume`."""
        return self._jobs.pause(self.id)

    def resume(self) -> Job:
        """Go on after a pause."""
        return self._jobs.resume(self.id)

    def events(self, limit: int | None = None) -> Pages[JobEvent]:
        """The job's log, newest first."""
        return self._jobs.events(self.id, limit)

    def checkpoints(self, limit: int | None = None) -> Pages[Checkpoint]:
        """The job's checkpoints, newest first."""
        return self._jobs.checkpoints(self.id, limit)

    def wait(
        self,
        *,
        progress: bool | JobView = False,
        poll: float = 1.0,
        timeout: float | None = None,
    ) -> Job:
        """Wait until the job has succeeded; a server that restarts meanwhile is waited for.

        Args:
            progress: True draws a bar on stderr (lines if that is no terminal); or your own view.
            poll: seconds between looks.
            timeout: seconds after which to stop waiting; the job goes on.

        Raises:
            JobError: if the job failed, was cancelled, or `timeout` passed.
        """
        return self._jobs.wait(self.id, progress=progress, poll=poll, timeout=timeout)


_JOB = TypeAdapter(Job)
_JOBS = TypeAdapter(ListPage[Job])


class Jobs:
    """Fine-tuning jobs: a training file becomes an adapter."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._models = Models(connection)

    def create(
        self,
        training_file: str | File | None = None,
        *,
        validation_file: str | File | None = None,
        model: str | None = None,
        idempotency_key: str | None = None,
        **params: Unpack[JobParams],
    ) -> Job:
        """Queue a job.

        Args:
            training_file, validation_file: uploaded files or their ids; without a validation file the server holds
                rows out. Several files go into `training_files` instead.
            model: the base's id, or an adapter to go on from; None asks the server for the base.
            idempotency_key: sent by itself, a fresh one each call; give one to make a repeated call the same job.
        """
        call = calls.create_job(
            _JOB,
            training_file=None if training_file is None else calls.file_id(training_file),
            validation_file=None if validation_file is None else calls.file_id(validation_file),
            model=model or self._models.base().id,
            params=params,
            idempotency_key=idempotency_key,
        )
        return self._connection.send(call).bind(self)

    def estimate(
        self,
        training_file: str | File | None = None,
        *,
        validation_file: str | File | None = None,
        model: str | None = None,
        **params: Unpack[JobParams],
    ) -> Estimate:
        """Rows, tokens, steps and time of the job that `create` would queue; nothing is queued."""
        call = calls.estimate_job(
            training_file=None if training_file is None else calls.file_id(training_file),
            validation_file=None if validation_file is None else calls.file_id(validation_file),
            model=model or self._models.base().id,
            params=params,
        )
        return self._connection.send(call)

    def get(self, job_id: str) -> Job:
        """One job."""
        return self._connection.send(calls.get_job(_JOB, job_id)).bind(self)

    def cancel(self, job_id: str) -> Job:
        """End a job without a result."""
        return self._act(job_id, "cancel")

    def pause(self, job_id: str) -> Job:
        """Keep a job's state and give its place to others, until `resume`."""
        return self._act(job_id, "pause")

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on."""
        return self._act(job_id, "resume")

    def events(self, job_id: str, limit: int | None = None) -> Pages[JobEvent]:
        """A job's log, newest first; `limit` is the size of a page."""
        return Pages(lambda after: self._connection.send(calls.job_events(job_id, after, limit)))

    def checkpoints(self, job_id: str, limit: int | None = None) -> Pages[Checkpoint]:
        """A job's checkpoints, newest first; `limit` is the size of a page."""
        return Pages(lambda after: self._connection.send(calls.job_checkpoints(job_id, after, limit)))

    def wait(
        self,
        job_id: str,
        *,
        progress: bool | JobView = False,
        poll: float = 1.0,
        timeout: float | None = None,
    ) -> Job:
        """`Job.wait`, by id."""
        watch = Watch(timeout)
        view = (JobBar() if progress else None) if isinstance(progress, bool) else progress
        try:
            while True:
                job = self._look(job_id, watch, view)
                if job is not None and watch.check(job):
                    return job
                self._connection.sleep(poll)
        finally:
            if view is not None:
                view.close()

    def list(self, *, metadata: Mapping[str, str] | None = None, limit: int | None = None) -> Pages[Job]:
        """All jobs, newest first; `metadata` keeps those that carry these pairs, `limit` is the size of a page."""

        def fetch(after: str | None) -> ListPage[Job]:
            page = self._connection.send(calls.list_jobs(_JOBS, after, limit, metadata))
            for job in page.data:
                job.bind(self)
            return page

        return Pages(fetch)

    def _act(self, job_id: str, action: str) -> Job:
        return self._connection.send(calls.job_action(_JOB, job_id, action)).bind(self)

    def _look(self, job_id: str, watch: Watch, view: JobView | None) -> Job | None:
        """Fetch the state, then show it with the events since; None if the server did not answer."""
        try:
            job = self.get(job_id)  # before the events: a finished job's events are all there
            fresh: Sequence[JobEvent] = self._unseen(job_id, watch) if view is not None else ()
        except TenoraError as error:
            watch.endure(error)
            return None
        watch.heard()
        if view is not None:
            view.show(job, fresh)
        return job

    def _unseen(self, job_id: str, watch: Watch) -> Sequence[JobEvent]:
        """The events that came since the last look, oldest first."""
        newest_first = []
        for event in self.events(job_id, limit=100):
            if watch.is_seen(event):
                break
            newest_first.append(event)
        if newest_first:
            watch.saw(newest_first[0])
        return newest_first[::-1]
