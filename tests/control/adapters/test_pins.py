"""What may be pinned, and what becomes of pins when the pool shrinks."""

from __future__ import annotations

import pytest

from tenora.control.control import Control
from tenora.control.tenancy.records import Principal
from tenora.errors import ConflictError
from tests.control.conftest import ImportAdapter, OpenControl, another_engine, create_job, messages, tenant, until
from tests.support.scripted_jobs import JobScript


async def test_pins_leave_half_of_the_slots_to_everyone_else(
    control: Control, acme: Principal, umbrella: Principal, script: JobScript, import_adapter: ImportAdapter
) -> None:
    await another_engine(control.engine, script, adapter_slots=4)
    digests = [(await import_adapter(control, acme, f"a{seed}", seed=seed)).digest for seed in range(3)]
    await import_adapter(control, umbrella, "same", seed=0)
    for name in ("a0", "a1", "a1"):
        await control.adapters.pin(acme, name, True)
    with pytest.raises(
        ConflictError, match="3 adapters would be pinned, and pins may take half of the 4 slots"
    ) as caught:
        await control.adapters.pin(acme, "a2", True)
    assert caught.value.code == "pins_full"
    assert not (await control.adapters.get(acme, "a2")).pinned
    assert script.pinned == {digests[0]: True, digests[1]: True}
    assert (await control.adapters.pin(umbrella, "same", True)).pinned  # of the same content, which takes no more
    await control.adapters.pin(acme, "a1", False)
    assert (await control.adapters.pin(acme, "a2", True)).pinned


async def test_pins_leave_room_for_the_largest_adapter(
    control: Control, acme: Principal, umbrella: Principal, script: JobScript, import_adapter: ImportAdapter
) -> None:
    unit = (await import_adapter(control, acme, "one", seed=1, rank=1)).bytes
    await another_engine(control.engine, script, adapter_pool_bytes=8 * unit)
    await import_adapter(control, acme, "four", seed=2, rank=4)
    await import_adapter(control, acme, "five", seed=3, rank=5)
    with pytest.raises(ConflictError, match=f"would take {5 * unit} bytes, and they may take half of the pool"):
        await control.adapters.pin(acme, "five", True)
    await import_adapter(control, umbrella, "six", seed=4, rank=6)
    with pytest.raises(ConflictError, match=f"the largest adapter needs {6 * unit}"):
        await control.adapters.pin(acme, "four", True)
    await control.adapters.pin(acme, "one", True)
    with pytest.raises(ConflictError, match="pinned adapters leave"):
        await import_adapter(control, umbrella, "eight", seed=5, rank=8)
    assert [one.name for one in await control.adapters.list(umbrella)] == ["six"]
    with pytest.raises(ConflictError, match="cannot be pinned"):  # a version that its pinned name cannot move to
        await import_adapter(control, acme, "one", seed=6, rank=5)
    assert (await control.adapters.get(acme, "one")).version == 1


async def test_a_pin_that_cannot_go_on_to_a_jobs_result_ends_in_the_jobs_log(
    control: Control, acme: Principal, script: JobScript, import_adapter: ImportAdapter
) -> None:
    small = await import_adapter(control, acme, "desk", seed=1, rank=1)
    await another_engine(control.engine, script, adapter_pool_bytes=60_000)  # of which the result takes 48,000
    await control.adapters.pin(acme, "desk", True)
    job = await create_job(control, acme, name="desk", publish="always", lora={"rank": 5})
    assert (await until(control, acme, job.id)).status == "succeeded"
    assert any(
        "desk is pinned no longer: pinned adapters would" in line for line in await messages(control, acme, job.id)
    )
    moved = await control.adapters.get(acme, "desk")
    assert (moved.version, moved.pinned) == (2, False)
    assert script.pinned == {small.digest: False}


async def test_pins_that_no_longer_fit_are_reported_at_start(
    open_control: OpenControl,
    import_adapter: ImportAdapter,
    script: JobScript,
    caplog: pytest.LogCaptureFixture,
) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    digests = [(await import_adapter(control, acme, f"a{seed}", seed=seed)).digest for seed in range(2)]
    for name in ("a0", "a1"):
        await control.adapters.pin(acme, name, True)
    await control.close()
    await another_engine(control.engine, script, adapter_slots=2)
    script.pins.clear()
    control = await open_control()
    assert len(script.pinned) == 1
    assert set(script.pinned) < set(digests)
    assert "a pin is not kept: 2 adapters would be pinned, and pins may take half of the 2 slots" in caplog.text
