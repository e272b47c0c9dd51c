"""What an adapter is held against: the base's own figures, measured while the job trains and kept in the registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from tenora.aclosing import aclosing
from tenora.control.files.rows import digests
from tenora.control.gate.few_shot import Prompted, few_shot_prompts
from tenora.control.gate.head_card import HeadShots
from tenora.control.gate.head_shots import Question, answered, questions
from tenora.control.gate.held_out import held_out_rows
from tenora.control.gate.lineage import TrainingFile
from tenora.control.gate.parity import probe_rows, score_rows
from tenora.control.inference.scoring import Scorer
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, LeaseLostError, owned, read_owned
from tenora.control.registry.database import RegistryBusyError, Session
from tenora.control.registry.tables import JobRow
from tenora.data.dataset import TokenizedDataset, concatenate
from tenora.errors import TenoraError
from tenora.model.provenance import BaseSource, base_source
from tenora.training.methods.table import find_method
from tenora.training.recipes import LEARNING_COST
from tenora.training.spec import TrainSpec

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

SHOTS = 3  # enough to show a form; each costs every scored row its tokens again
SCORED_ROWS = 20
SHARE = 0.03  # of the training work may be spent on the k-shot rows, within the two bounds below
_LEAST_TOKENS, _MOST_TOKENS = 2048, 16_384
_GIVE_WAY_SECONDS = 10.0  # that a k-shot row waits for the requests of tenants to end: its prefill slows them down
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 0.5  # that a finished run waits for the probe rows, if they are missing still
_FEW_SHOT_PATIENCE_SECONDS = 120.0  # if the comparison is what the job is about


class FewShotLosses(msgspec.Struct, frozen=True, kw_only=True):
    """Losses of held-out rows under the base behind `shots` training rows: nats, summed over learned tokens."""

    shots: int
    rows: list[int]
    losses: list[float]


class NotedTask(msgspec.Struct, frozen=True, kw_only=True):
    """What a training file held, in examples; see `tenora.control.gate.card.TaskCard`."""

    name: str
    file: str
    weight: float
    trained: int
    held_out: int
    cut: int


class Baselines(msgspec.Struct, frozen=True, kw_only=True):
    """The base through the serving path, and what is known of the rows.

    Attributes:
        files: what the adapter is trained on.
        tasks: file by file.
        split_seed: that drew the held-out rows; None if none were drawn.
        near_duplicates: held-out rows that are nearly training rows; None if none are held out.
        probe: log-probabilities of the probe rows' learned tokens.
        few_shot, head_shots: of tokens, and of classes; None if it was not measured.
        notes: why something is missing.
    """

    files: list[TrainingFile] = []
    tasks: list[NotedTask] = []
    split_seed: int | None = None
    near_duplicates: int | None = None
    probe: list[list[float]] = []
    few_shot: FewShotLosses | None = None
    head_shots: HeadShots | None = None
    notes: list[str] = []
    complete: bool = False


@dataclass(slots=True)
class Measuring:
    """The measurement of a job's baselines while it runs. `found` grows."""

    found: Baselines = field(default_factory=Baselines)
    task: asyncio.Task[None] | None = None

    async def result(self, *, few_shot: bool) -> Baselines:
        """What there is at the end of the run. It is measured no further: the adapter is what the engine is for now.

        Args:
            few_shot: the comparison with the prompted base is what the job is about, and is waited for.
        """
        if self.task is not None:
            if few_shot:
                await asyncio.wait([self.task], timeout=_FEW_SHOT_PATIENCE_SECONDS)
            elif not (self.found.probe or self.found.head_shots):
                await asyncio.wait([self.task], timeout=_PATIENCE_SECONDS)
        await self.stop()
        return self.found

    async def stop(self) -> None:
        """Measure no further; what was found stays."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])


async def note_rows(
    session: Session,
    row: JobRow,
    tasks: Sequence[NotedTask],
    *,
    split_seed: int | None,
    near_duplicates: int | None,
) -> None:
    """Keep what is known of the rows when they are prepared: the files may be deleted before the job ends."""
    files = await _files(session, row)
    noted = Baselines(files=files, tasks=list(tasks), split_seed=split_seed, near_duplicates=near_duplicates)
    row.baselines = msgspec.to_builtins(noted)


async def base_of(context: JobContext) -> BaseSource | None:
    """Where the base comes from; None if its files cannot be read any more."""
    try:
        return await asyncio.to_thread(base_source, context.model)
    except OSError as error:
        _log.warning("the base's weights could not be hashed: %s", error)
        return None


@contextlib.asynccontextmanager
async def measuring(context: JobContext, claim: Claim, spec: TrainSpec) -> AsyncIterator[Measuring]:
    """Measure beside what the block does; what is not done at its end is dropped."""
    measuring = Measuring()
    measuring.task = asyncio.create_task(_run(context, claim, spec, measuring), name=f"baselines-{claim.job_id}")
    try:
        yield measuring
    finally:
        await measuring.stop()


async def _run(context: JobContext, claim: Claim, spec: TrainSpec, measuring: Measuring) -> None:
    """Measure and keep; the job goes on without what fails here."""
    try:
        async with context.database.read() as session:
            row = await read_owned(session, claim)
        measuring.found = msgspec.convert(row.baselines or {}, Baselines)
        if measuring.found.complete:
            return
        scorer = Scorer.behind_requests(context.engine, claim.tenant_id)
        if find_method(spec.method).has_head:
            await base_of(context)
            await _head_shots(context, claim, spec, scorer, measuring)
            return
        await _probe(context, claim, spec, scorer, measuring)
        await base_of(context)  # hashed once a process, and better now than when the adapter is ready
        await _few_shot(context, claim, spec, scorer, measuring)
    except LeaseLostError:
        return
    except TenoraError as error:
        _log.warning("job %s: the base was not measured to the end: %s", claim.job_id, error.message)
    except Exception:  # noqa: BLE001 (logged: a defect here is no reason to lose the training)
        _log.exception("job %s: the base was not measured to the end", claim.job_id)


async def _probe(context: JobContext, claim: Claim, spec: TrainSpec, scorer: Scorer, measuring: Measuring) -> None:
    if measuring.found.probe:
        return
    rows = probe_rows(await asyncio.to_thread(held_out_rows, spec))
    measuring.found = msgspec.structs.replace(measuring.found, probe=await score_rows(scorer, rows, None))
    await _keep(context, claim, measuring.found)


async def _few_shot(context: JobContext, claim: Claim, spec: TrainSpec, scorer: Scorer, measuring: Measuring) -> None:
    """The base behind a few training rows, on as many held-out rows as the job's size pays for."""
    notes: list[str] = []
    if not find_method(spec.method).no_few_shot:
        longest = context.engine.ready.max_model_len
        chosen, shots = await context.tokenizing.baseline(
            claim.tenant_id, lambda tokenizer: _choose(tokenizer, spec, longest)
        )
        losses: list[float] = []
        for prompt in chosen:  # one at a time: whoever waits for an answer waits for no more than one of these
            await _give_way(context)
            losses.append(-sum(await scorer.score(prompt.tokens, prompt.learned)))
            few_shot = FewShotLosses(shots=shots, rows=[one.row for one in chosen[: len(losses)]], losses=list(losses))
            measuring.found = msgspec.structs.replace(measuring.found, few_shot=few_shot)
        if not chosen:
            notes.append("No held-out row fits the context behind a training row, so there is no few-shot baseline.")
    measuring.found = msgspec.structs.replace(measuring.found, notes=notes, complete=True)
    await _keep(context, claim, measuring.found)


async def _head_shots(context: JobContext, claim: Claim, spec: TrainSpec, scorer: Scorer, measuring: Measuring) -> None:
    """The base's classes of held-out rows, behind a few training rows."""
    longest = context.engine.ready.max_model_len

    def choose(tokenizer: Tokenizer) -> tuple[list[Question], int]:
        train = concatenate([TokenizedDataset.load(Path(task.train_path)) for task in spec.tasks])
        return questions(tokenizer, train, held_out_rows(spec), max_length=longest, seed=spec.seed)

    asked, shots = await context.tokenizing.baseline(claim.tenant_id, choose)
    said: list[int] = []
    async with aclosing(answered(scorer, asked)) as answers:
        async for answer in answers:
            said.append(answer)
            found = HeadShots(shots=shots, rows=[one.row for one in asked[: len(said)]], said=list(said))
            measuring.found = msgspec.structs.replace(measuring.found, head_shots=found)
            await _give_way(context)
    measuring.found = msgspec.structs.replace(measuring.found, complete=True)
    await _keep(context, claim, measuring.found)


async def _give_way(context: JobContext) -> None:
    """Wait until nobody is being answered, but not for ever."""
    deadline = time.monotonic() + _GIVE_WAY_SECONDS
    while context.engine.open_requests and time.monotonic() < deadline:  # noqa: ASYNC110  # nobody tells of idleness
        await asyncio.sleep(_POLL_SECONDS)


def _choose(tokenizer: Tokenizer, spec: TrainSpec, max_length: int) -> tuple[list[Prompted], int]:
    """The rows to score, and how many shots stand before each: as many up to SHOTS as leave a row that fits."""
    train = concatenate([TokenizedDataset.load(Path(task.train_path)) for task in spec.tasks])
    held_out, same = held_out_rows(spec), not any(task.valid_path for task in spec.tasks)
    budget = int(SHARE * LEARNING_COST * spec.n_epochs * train.num_tokens)
    budget = min(max(budget, _LEAST_TOKENS), _MOST_TOKENS)
    for shots in range(SHOTS, 0, -1):
        fitting = few_shot_prompts(
            tokenizer, train, held_out, same=same, shots=shots, max_length=max_length, seed=spec.seed
        )
        chosen: list[Prompted] = []
        for prompt in islice(fitting, SCORED_ROWS):
            budget -= len(prompt.tokens)
            if chosen and budget < 0:
                break
            chosen.append(prompt)
        if chosen:
            return chosen, shots
    return [], 0


async def _files(session: Session, row: JobRow) -> list[TrainingFile]:
    training = [one["file"] for one in row.training_files] if row.training_files else [row.training_file]
    wanted: list[tuple[str, Literal["training", "validation"]]] = [(file_id, "training") for file_id in training]
    if row.validation_file is not None:
        wanted.append((row.validation_file, "validation"))
    known = await digests(session, row.tenant_id, [file_id for file_id, _ in wanted])
    return [TrainingFile(id=file_id, purpose=purpose, sha256=known.get(file_id)) for file_id, purpose in wanted]


async def _keep(context: JobContext, claim: Claim, found: Baselines) -> None:
    """Write it down; with a busy registry it is measured again if the job has to be taken up by another process."""
    try:
        async with context.database.write() as session:
            (await owned(session, claim)).baselines = msgspec.to_builtins(found)
    except RegistryBusyError as error:
        _log.warning("job %s: the base's figures were not kept: %s", claim.job_id, error.message)
