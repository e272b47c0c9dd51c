"""The gate: an adapter that would not be served as it was trained, or that is not wholly trained, is not published."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenora.adapters.peft_format import write_adapter
from tenora.adapters.pool import SlotPool
from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.control.control import Control
from tenora.control.gate.parity import TOLERANCE, compare_paths, probe_rows, require_weights
from tenora.control.jobs.records import JobRecord
from tenora.control.tenancy.records import Principal
from tenora.data.dataset import TokenizedDataset
from tenora.engine import reading
from tenora.errors import ModelNotFoundError, NotFoundError, TrainingError
from tenora.training.spec import LoraSpec
from tests.control.conftest import ROWS, create_job, tenant, until, upload
from tests.control.test_real_engine import Service, _one_thread, service
from tests.support.scripted_jobs import random_modules

__all__ = ["_one_thread", "service"]  # fixtures

NAMES = ("q_proj", "v_proj")


async def train(control: Control, who: Principal, **fields: Any) -> JobRecord:
    """A job of a few steps with a validation file, at its end."""
    valid = await upload(control, who, ROWS[:8])
    fields = {"n_epochs": 2, "batch_size": 4, "lora": {"rank": 4}, "name": "desk", "seed": 1} | fields
    job = await create_job(control, who, validation_file=valid.id, learning_rate=5e-3, **fields)
    return await until(control, who, job.id)


async def test_a_sound_adapter_passes_with_a_gap_far_below_its_effect(service: Service) -> None:
    acme = await tenant(service.control, "acme")
    done = await train(service.control, acme)
    assert done.status == "succeeded", done.error
    assert done.evaluation is not None
    parity = done.evaluation["parity"]
    assert parity["rows"] == 4
    assert parity["modules"] == 21
    assert parity["gap"] < 1e-4 < TOLERANCE["float32"] < 0.5 < parity["effect"]


def double_the_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serving would do if it took 2 · alpha / rank."""
    prepare = reading.prepare

    def doubled(*args: Any, **kwargs: Any) -> PreparedAdapter:
        prepared = prepare(*args, **kwargs)
        return dataclasses.replace(prepared, scaling=tuple(2.0 * value for value in prepared.scaling))

    monkeypatch.setattr(reading, "prepare", doubled)


def serve_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serving would do if slots were filled and then not used."""
    insert = SlotPool.insert

    def nothing(self: SlotPool, digest: str, prepared: PreparedAdapter) -> Any:
        silent = dataclasses.replace(prepared, scaling=tuple(0.0 for _ in prepared.scaling))
        return insert(self, digest, silent)

    monkeypatch.setattr(SlotPool, "insert", nothing)


@pytest.mark.parametrize("break_serving", [double_the_scaling, serve_the_base])
async def test_a_broken_serving_scale_fails_the_job(
    service: Service, monkeypatch: pytest.MonkeyPatch, break_serving: Any
) -> None:
    control = service.control
    acme = await tenant(control, "acme")
    with monkeypatch.context() as broken:
        break_serving(broken)
        failed = await train(control, acme)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "parity_failed"
    assert "gap" in failed.error["message"]
    assert (failed.fine_tuned_model, failed.result_files) == (None, ())
    with pytest.raises(NotFoundError):
        await control.adapters.get(acme, "desk")
    with pytest.raises(ModelNotFoundError):
        await control.inference.resolve(acme, "desk")
    assert list((await control.jobs.checkpoints(acme, failed.id)).items) == []
    assert control._blobs.store.list() == ()
    done = await train(control, acme)  # the same rows and seed: the same digest, loaded anew
    assert done.status == "succeeded", done.error


async def test_what_was_published_stays_when_its_twin_fails(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob that another row names is not freed."""
    control = service.control
    acme, umbrella = await tenant(control, "acme"), await tenant(control, "umbrella")
    done = await train(control, acme)
    await control.engine.evict((await control.adapters.get(acme, "desk")).digest)  # so that it is loaded anew
    double_the_scaling(monkeypatch)
    failed = await train(control, umbrella)
    assert failed.error is not None
    assert failed.error["code"] == "parity_failed"
    assert done.fine_tuned_model is not None
    assert (await control.inference.resolve(acme, done.fine_tuned_model)).adapter is not None


def write(path: Path, targets: Sequence[TargetModule], change: Any) -> Path:
    modules = random_modules(targets, NAMES, 4, 0)
    change(modules)
    write_adapter(path, base_model="tiny", lora=LoraSpec(rank=4, target_modules=NAMES), modules=modules)
    return path


def test_every_module_must_carry_weights(tmp_path: Path, base_rows: TableRows) -> None:
    targets = base_rows.modules
    paths = [target.path for target in targets if target.name in NAMES]

    def zero(modules: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        modules[paths[0]][1][:] = -0.0
        modules[paths[3]][0][:] = 0.0

    whole = str(write(tmp_path / "whole", targets, lambda _: None))
    shape = LoraSpec(rank=4, target_modules=NAMES)
    assert require_weights(whole, base_rows, shape, max_rank=8) == len(paths)
    with pytest.raises(TrainingError) as raised:
        require_weights(
            str(write(tmp_path / "holes", targets, zero)), base_rows, LoraSpec(rank=4, target_modules=NAMES), max_rank=8
        )
    assert raised.value.code == "untrained_modules"
    assert f"{paths[0]} (zero), {paths[3]} (zero)" in raised.value.message
    with pytest.raises(TrainingError, match=r"self_attn.o_proj \(missing\)"):
        require_weights(whole, base_rows, LoraSpec(rank=4, target_modules=(*NAMES, "o_proj")), max_rank=8)


def dataset(rows: Sequence[tuple[int, int]]) -> TokenizedDataset:
    """Rows of so many tokens, learned from the given place on."""
    weights = [np.arange(length) >= first for length, first in rows]
    return TokenizedDataset(
        tokens=np.concatenate([np.arange(length) for length, _ in rows]).astype(np.int32),
        weights=np.concatenate(weights).astype(np.uint8),
        offsets=np.cumsum([0, *(length for length, _ in rows)]),
        lines=np.arange(len(rows)),
    )


def test_probe_rows_are_short_and_keep_learned_tokens() -> None:
    rows = probe_rows(dataset([(1000, 900), (300, 10)]))
    assert [(len(row.tokens), row.learned) for row in rows] == [(964, list(range(900, 964)))]
    rows = probe_rows(dataset([(80, 10), (1000, 20), (80, 10)]))
    assert [len(row.tokens) for row in rows] == [80]  # the second would be 192
    rows = probe_rows(dataset([(80, 10), (112, 20), (80, 10)]))
    assert [len(row.tokens) for row in rows] == [80, 112]
    (row,) = probe_rows(dataset([(300, 100)]))
    assert row.learned == list(range(100, 192))


def test_a_gap_is_measured_on_what_both_have() -> None:
    rows = probe_rows(dataset([(5, 2), (6, 4)]))
    served = [[-1.0, -2.0, -3.0], [-1.0, -2.0]]
    training = [[-1.0, -2.0, -3.0005, -9.0], [-1.0, -2.0], [-7.0]]
    found = compare_paths(rows, served, training, [[-1.0, -2.5, -3.0]], dtype="float32", modules=2)
    assert (found.rows, found.tokens) == (2, 5)
    assert found.gap == pytest.approx(5e-4)
    assert found.effect == pytest.approx(0.5)
    training[1][1] = float("nan")
    with pytest.raises(TrainingError, match="held-out row 2, token 6") as raised:
        compare_paths(rows, served, training, [], dtype="bfloat16", modules=2)
    assert raised.value.code == "parity_failed"
    assert compare_paths([], [], [], [], dtype="float32", modules=2).gap is None
