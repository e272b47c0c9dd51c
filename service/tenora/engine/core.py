"""The engine: schedule, run, emit; then a slice of training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from tenora.adapters.host_cache import HostCache
from tenora.adapters.pool import SlotPool
from tenora.adapters.upload import uploader_for
from tenora.config import Settings
from tenora.engine.blocks import BlockManager
from tenora.engine.client.child import available_cpus
from tenora.engine.clock import clock_of
from tenora.engine.context_length import check_context, context_length
from tenora.engine.deletions import Deletions
from tenora.engine.loader import AdapterLoader
from tenora.engine.loading_progress import LoadingProgress
from tenora.engine.messages import (
    Abort,
    Acknowledge,
    Command,
    EngineStats,
    Event,
    EvictAdapter,
    ForgetPrefixes,
    Generate,
    Loading,
    Outputs,
    PinAdapter,
    Pool,
    PutCommand,
    Ready,
    StartSession,
    StartTraining,
    StopTraining,
)
from tenora.engine.model_runner import ModelRunner
from tenora.engine.outputs import Item, advance, failed, is_final, step_failure
from tenora.engine.pooling import Heads
from tenora.engine.prefixes import AdapterPrefixes
from tenora.engine.reading import AdapterFiles
from tenora.engine.rehearsal import peak_bytes, rehearse
from tenora.engine.requests import check_request
from tenora.engine.resources import Facts, Resources, resources
from tenora.engine.rollouts import Rollouts
from tenora.engine.scheduler import Scheduled, Scheduler
from tenora.engine.sequence import SequenceState
from tenora.engine.trainer import Trainer
from tenora.errors import ConfigurationError, TenoraError
from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.device import survive
from tenora.model.executors import kernels
from tenora.model.executors.choice import executor_for
from tenora.model.loading import load_decoder, resolve_device, resolve_dtype
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.varlen import activate
from tenora.training.fusion import FusedTraining, Run
from tenora.training.resident_base import TrainingHost
from tenora.training.run import JobRun
from tenora.training.spec import SessionSpec, TrainSpec
from tenora_kernels.cpu.precompile import wait_for_others
from tenora_kernels.cpu.runtime.team import Team

_log = logging.getLogger(__name__)

IDLE_SLICE_SECONDS = 0.02  # of training between two looks at the commands while nothing is generated


class Engine:
    """One accelerator's data plane. Single-threaded: every method runs on the thread of the step loop.

    Attributes:
        settings: with everything settled that was left open.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        *,
        wake: Callable[[], None] = lambda: None,
        commands_wait: Callable[[], bool] = lambda: False,
        start_run: Callable[[TrainingHost, TrainSpec | SessionSpec], Run] = JobRun,
    ) -> None:
        """Take its memory. Raises ConfigurationError if there is not enough for keys and values, or for the context.

        Args:
            decoder: the resident base.
            settings: block size, KV and adapter memory, limits; what they leave open is settled by the device.
            wake: called from a background thread when an adapter has been read, so that an idle loop takes a step.
            commands_wait: whether a command has arrived that was not added yet; training makes room for it.
            start_run: makes a training run.
        """
        spec = decoder.spec
        found = _share_out(decoder, settings)
        self.settings = settings = found.settle(settings)
        per_block = KVCache.bytes_per_block(spec, settings.block_size, decoder.dtype)
        num_blocks = settings.kv_cache_bytes // per_block
        if num_blocks == 0:
            raise ConfigurationError(f"TENORA_KV_CACHE_BYTES is too small: one block takes {per_block} bytes.")
        self.max_model_len = context_length(settings, spec, num_blocks)
        self.decoder = decoder
        self.rows = table_rows(spec)
        self.pool = SlotPool(
            self.rows,
            max_slots=settings.max_adapters,
            max_bytes=settings.adapter_pool_bytes,
            dtype=decoder.dtype,
            device=decoder.device,
            uploader=uploader_for(decoder.device, wake),
        )
        cache = KVCache.allocate(spec, num_blocks, settings.block_size, dtype=decoder.dtype, device=decoder.device)
        self.loader = AdapterLoader(
            self.pool,
            AdapterFiles(decoder, self.pool.tables.arena, max_rank=settings.max_lora_rank).read,
            HostCache(settings.host_cache_bytes),
            wake,
        )
        self.blocks = BlockManager(num_blocks, settings.block_size)
        self.scheduler = Scheduler(
            self.blocks,
            self.loader,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            prefixes=AdapterPrefixes(
                decoder, cache, self.pool.tables, self.rows, tokens_per_pass=settings.max_num_batched_tokens
            ),
        )
        executor = executor_for(
            decoder,
            cache,
            self.pool.tables,
            max_rows=self.scheduler.max_num_seqs,
            max_tokens=settings.max_num_batched_tokens,
            max_context=self.max_model_len,
            max_rank=settings.max_lora_rank,
        )
        heads = Heads.of(self.pool.tables, self.rows)
        self.runner = ModelRunner(decoder, cache, executor, self.pool.tables, heads)
        self.rollouts = Rollouts(self.add, self.loader.offer)
        training = FusedTraining(
            decoder,
            tokens_per_pass=settings.train_tokens_per_microbatch,
            memory=found.training_bytes,
            sampler=self.rollouts,
            start=start_run,
        )
        self.trainer = Trainer(
            training,
            share=settings.training_share,
            commands_wait=commands_wait,
            clock=clock_of(decoder.device),
        )
        self._deletions = Deletions(self._held)
        self._rejected: list[Item] = []
        self._arrivals = 0
        self._worked = False
        self._steps = self._prompt_tokens = self._generation_tokens = 0

    @classmethod
    def load(
        cls,
        settings: Settings,
        model_dir: Path,
        *,
        wake: Callable[[], None] = lambda: None,
        commands_wait: Callable[[], bool] = lambda: False,
        report: Callable[[Loading], None] = lambda _: None,
    ) -> Engine:
        """Load the base and take the memory that `settings` name; `report` is told how far that is.

        Raises:
            UnsupportedModelError, ConfigurationError: it cannot serve this model so.
        """
        threads = settings.threads or available_cpus()
        torch.set_num_threads(threads)
        device = resolve_device(settings.device)
        dtype = resolve_dtype(settings.dtype, device)
        check_context(settings, ModelSpec.from_directory(model_dir))
        if device.type == "cuda":
            _log.info("attention of prompts", extra={"implementation": activate(device)})
        progress = LoadingProgress(report)
        decoder = load_decoder(
            model_dir, device=device, dtype=dtype, team=Team.shared(threads), report=progress.weights
        )
        if device.type == "cpu":
            wait_for_others(progress.kernels)
        with progress.compiling():
            kernels.warm_up(decoder, train=settings.role != "serve")
        engine = cls(decoder, settings, wake=wake, commands_wait=commands_wait)
        engine.runner.warm_up(engine.settings.max_num_batched_tokens)
        return engine

    @property
    def ready(self) -> Ready:
        """What the API has to know about this engine."""
        return Ready(
            device=str(self.decoder.device),
            dtype=str(self.decoder.dtype).removeprefix("torch."),
            max_model_len=self.max_model_len,
            hidden_size=self.decoder.spec.hidden_size,
            kv_blocks=self.blocks.num_blocks,
            block_size=self.blocks.block_size,
            kv_cache_bytes=self.settings.kv_cache_bytes,
            adapter_pool_bytes=self.settings.adapter_pool_bytes,
            max_num_seqs=self.scheduler.max_num_seqs,
            max_num_batched_tokens=self.settings.max_num_batched_tokens,
            target_modules=tuple(dict.fromkeys(module.name for module in self.rows.modules)),
            adapter_slots=self.pool.tables.slots,
        )

    @property
    def has_work(self) -> bool:
        """False if the last step could do nothing and no command came since: then only a command or `wake` helps."""
        return self._worked

    def add(self, command: Command) -> None:
        """Take a command. What is wrong with it comes out of the next step."""
        self._worked = True
        match command:
            case Generate() | Pool():
                self._add_sequence(command)
            case Abort(request_id=request_id):
                if (sequence := self.scheduler.get(request_id)) is not None:
                    self.scheduler.finish(sequence)
            case StartTraining(spec=spec) | StartSession(spec=spec):
                self.trainer.start(spec)
            case PutCommand(run_id=run_id, command=told):
                self.trainer.put(run_id, told)
            case Acknowledge(run_id=run_id, count=count):
                self.trainer.acknowledge(run_id, count)
            case StopTraining(run_id=run_id, pause=pause):
                self.trainer.stop(run_id, pause=pause)
            case PinAdapter(adapter=ref, pinned=pinned):
                if pinned:
                    self._deletions.used(ref)
                self.loader.pin(ref, pinned)
            case EvictAdapter(digest=digest):
                self._deletions.deleted(digest)
            case ForgetPrefixes(cache_salt=cache_salt):
                self.blocks.forget_salt(cache_salt)

    def step(self) -> list[Event]:
        """Schedule, run, emit; then train if it is training's turn, or for a moment if there was nothing to do.

        Raises:
            DeviceLostError: the device is gone; so is the engine.
        """
        started = time.monotonic()
        self.loader.read_ahead(self.scheduler.upcoming_adapters())
        self.loader.settle_pins()
        batch = self.scheduler.schedule()
        items = self._take_rejected()
        if batch:
            self._steps += 1
            items += self._run(batch)
        self._collect_adapters()
        items = self.rollouts.take(items)
        events: list[Event] = [Outputs(items)] if items else []
        self._worked = False  # unless a run asks for sequences meanwhile
        if batch:
            events += self.trainer.beside(time.monotonic() - started)
        else:
            events += self.trainer.slice(IDLE_SLICE_SECONDS, drain=False)
        self._worked |= bool(batch or events or self.trainer.busy)
        return events

    def shutdown(self) -> list[Event]:
        """Fail every sequence, save the state of every run. The engine is of no use afterwards."""
        message = "The server is shutting down; retry on another one."
        items: list[Item] = []
        for sequence in self.scheduler.live():
            self.scheduler.finish(sequence)
            items.append(failed(sequence.id, "engine_shutdown", message))
        items = self.rollouts.take(items)
        events: list[Event] = [Outputs(items)] if items else []
        events += self.trainer.shutdown()
        self.loader.close()
        return events

    def stats(self) -> EngineStats:
        """Counters since start and gauges of now."""
        running = self.scheduler.running
        return EngineStats(
            running=len(running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_total=self.blocks.num_blocks,
            kv_blocks_used=self.blocks.num_used,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            preemptions=self.scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            adapter_slots=self.pool.tables.slots,
            adapters_resident=self.pool.resident(),
            adapters_running=_digests(running),
            adapters_waiting=_digests(self.scheduler.waiting),
            adapter_loads=self.loader.loads,
            adapter_load_seconds=self.loader.load_seconds,
            adapter_load_failures=self.loader.failures,
            adapter_evictions=self.pool.evictions,
            training_runs=self.trainer.active,
            trained_tokens=self.trainer.trained_tokens,
            steps=self._steps,
        )

    def check_integrity(self) -> None:
        """Raise unless the owners of blocks and slots can account for each of them."""
        self.scheduler.check_integrity()
        self.runner.check_integrity()
        self.loader.check_integrity()

    def _add_sequence(self, request: Generate | Pool) -> None:
        if request.adapter is not None:
            self._deletions.used(request.adapter)
        if self.scheduler.get(request.request_id) is not None:
            _log.error("a request id is in use; the second request is ignored", extra={"request": request.request_id})
            return
        length_class = self.decoder.rotary.length_class(len(request.token_ids))
        try:
            check_request(request, vocab_size=self.decoder.spec.vocab_size, max_model_len=self.max_model_len)
            self.scheduler.add(SequenceState.start(request, self._arrivals, length_class))
        except TenoraError as error:
            code = error.code if error.code == "context_length_exceeded" else "invalid_request"
            self._rejected.append(failed(request.request_id, code or "invalid_request", error.message))
            return
        self._arrivals += 1

    def _take_rejected(self) -> list[Item]:
        """Sequences that ended without running: bad requests, and those whose adapter cannot be loaded."""
        items, self._rejected = self._rejected, []
        for sequence, error in self.scheduler.failed:
            items.append(failed(sequence.id, error.code or "adapter_unavailable", error.message))
        return items

    def _run(self, batch: list[Scheduled]) -> list[Item]:
        """Run the model; what goes wrong there ends the batch's sequences, and the engine too if its device is lost."""
        try:
            results = self.runner.run(batch)
        except Exception as error:  # noqa: BLE001  # it is logged, and told to every sequence concerned
            ids = [item.sequence.id for item in batch]
            _log.exception("a step failed", extra={"requests": ids})
            survive(error, self.decoder.device)
            code, message = step_failure(error)
            for item in batch:
                self.scheduler.finish(item.sequence)
            return [failed(request_id, code, message) for request_id in ids]
        outputs: list[Item] = []
        for scheduled, result in zip(batch, results, strict=True):
            sequence = scheduled.sequence
            self.scheduler.computed(scheduled)
            if sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += result.prompt_logprobs
            if scheduled.samples:
                self._prompt_tokens += 0 if sequence.reported else sequence.num_prompt
                self._generation_tokens += result.token is not None
                output = advance(sequence, result, self.max_model_len)
                outputs.append(output)
                if is_final(output):
                    self.scheduler.finish(sequence)
        return outputs

    def _collect_adapters(self) -> None:
        """Free what only ended sequences used."""
        in_use = self.scheduler.adapter_use
        self.loader.drop_unwanted(in_use)
        for digest in self._deletions.due(in_use):
            self.loader.forget(digest)
            self.blocks.forget(digest)

    def _held(self) -> set[str]:
        """Digests of what waits, runs, is read, or has left weights, keys or values here."""
        return {*self.scheduler.adapter_use, *self.loader.held(), *self.blocks.adapters()}


def _share_out(decoder: Decoder, settings: Settings) -> Resources:
    """What the engine takes of its device; on a GPU after the largest step was run once."""
    facts = Facts.of(decoder)
    found = resources(facts, decoder.spec, settings, dtype=decoder.dtype)
    if facts.type == "cuda":
        step = rehearse(
            decoder, tokens=found.max_num_batched_tokens, seqs=found.max_num_seqs, block_size=settings.block_size
        )
        seen = peak_bytes(step, decoder.device)
        del step
        found = resources(facts, decoder.spec, settings, dtype=decoder.dtype, activations=seen)
    _log.info("memory and limits", extra={"device": asdict(facts), **asdict(found)})
    return found


def _digests(sequences: Iterable[SequenceState]) -> tuple[str, ...]:
    return tuple(sorted({sequence.digest for sequence in sequences if sequence.digest}))
