"""chat, files, train, jobs, adapters: through the real client, HTTP server and control plane."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from tenora.cli.app import app
from tenora.training.kinds.table import OWN
from tenora.training.methods.table import METHODS
from tenora.training.settings import JOB, RUN
from tenora.training.spec import LORA_ASKED
from tests.api.conftest import SPEECH, TRAINING_ROWS
from tests.cli.conftest import Shell


async def test_chat_once(shell: Shell) -> None:
    answer = await shell.ok("chat", "-m", "Say it.", "--system", "Be brief.", "--max-tokens", "9")
    assert SPEECH.startswith(answer.strip())
    request = shell.service.script.requests[0]
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, 9)
    prompt = shell.service.control.inference.tokenizer.decode(request.token_ids)
    assert "Be brief." in prompt


async def test_chat_composes_adapters(shell: Shell, make_adapter: Callable[..., Path]) -> None:
    for seed, name in enumerate(("fox", "owl")):
        await shell.ok("adapters", "import", name, str(make_adapter(seed)))
    shell.service.script.requests.clear()
    scaled = ("--adapter-scale", "0.5", "--combination", "ties", "--density", "0.25")
    await shell.ok("chat", "--adapter", "fox=0.5", "--adapter", "owl", *scaled, "-m", "Say it.")
    (request,) = shell.service.script.requests
    assert request.adapter is not None
    made = request.adapter.composition
    assert made is not None
    assert ({part.weight for part in made.parts}, made.combination, made.density) == ({0.25, 0.5}, "ties", 0.25)
    result = await shell("chat", "--adapter", "fox=much", "-m", "Say it.")
    assert result.exit_code == 2
    assert "NAME=WEIGHT" in result.output


async def test_a_conversation_remembers(shell: Shell) -> None:
    answer = await shell.ok("chat", "--max-tokens", "5", stdin="First.\n\nSecond.\n")
    assert len(answer.strip().splitlines()) == 2
    prompt = shell.service.control.inference.tokenizer.decode(shell.service.script.requests[1].token_ids)
    assert prompt.index("First.") < prompt.index(answer.splitlines()[0]) < prompt.index("Second.")


async def test_an_unknown_model_is_one_line(shell: Shell) -> None:
    result = await shell("chat", "nobody", "-m", "hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: The model 'nobody' does not exist")
    assert "Traceback" not in result.output


async def test_files(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(TRAINING_ROWS)
    uploaded = json.loads(await shell.ok("files", "upload", str(path), "--json"))
    listed = await shell.ok("files", "list")
    assert listed.splitlines()[0].split() == ["ID", "CREATED_AT", "BYTES", "PURPOSE", "STATUS", "FILENAME"]
    assert uploaded["id"] in listed
    shown = await shell.ok("files", "preview", uploaded["id"], "--limit", "2")
    assert shown.startswith("line 1: ")
    assert "A quick one.<|im_end|>" in shown
    assert "form chat; 2 rows shown, 0 of them unusable" in shown
    page = json.loads(await shell.ok("files", "preview", uploaded["id"], "--after", "11", "--json"))
    assert ([row["line"] for row in page["data"]], page["has_more"]) == ([12], False)
    assert "is deleted" in await shell.ok("files", "delete", uploaded["id"])
    path.write_text("{}\n")
    bad = await shell("files", "upload", str(path))
    assert bad.exit_code == 1
    assert "missing" in bad.stdout
    listed = json.loads((await shell.ok("files", "list", "--json")).splitlines()[0])
    assert "missing_messages_list: The row" in await shell.ok("files", "preview", listed["id"])


async def test_train_and_jobs(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(TRAINING_ROWS)
    arguments = ("--name", "fox", "--epochs", "2", "--rank", "8", "--learning-rate", "0.001", "--no-wait", "--json")
    job = json.loads(await shell.ok("train", str(path), *arguments))
    assert (job["name"], job["hyperparameters"]["n_epochs"], job["lora"]["rank"]) == ("fox", 2, 8)
    assert job["learning_rate"] == 0.001
    assert job["id"] in await shell.ok("jobs", "list")
    assert "training_file" in await shell.ok("jobs", "show", job["id"])
    assert "cancelled" in await shell.ok("jobs", "cancel", job["id"])
    assert (await shell("jobs", "resume", job["id"])).exit_code == 1
    assert "info" in await shell.ok("jobs", "events", job["id"])


async def test_train_takes_tasks_sweeps_and_a_start(
    shell: Shell, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    await shell.ok("adapters", "import", "fox", str(make_adapter(1)))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(TRAINING_ROWS)
    files = (str(tmp_path / "a.jsonl"), f"{tmp_path / 'b.jsonl'}=0.5")
    sweep = ("--sweep", "rank=8,16", "--sweep", "learning_rate=1e-4..1e-3", "--trials", "4")
    made = await shell.ok("train", *files, *sweep, "--init-from", "fox", "--early-stopping", "--no-wait", "--json")
    job = json.loads(made)
    assert [(one["name"], one["weight"]) for one in job["training_files"]] == [("a", 1.0), ("b", 0.5)]
    assert job["sweep"] == {"trials": 4, "rank": [8, 16], "learning_rate": {"min": 1e-4, "max": 1e-3}}
    assert (job["parent"], job["early_stopping"], job["lora"]["init_from"]) == ("fox", 3, "fox")
    assert "cancelled" in await shell.ok("jobs", "cancel", job["id"])
    dpo = await shell("train", files[0], "--method", "ppo", "--no-wait")
    assert (dpo.exit_code, "method" in dpo.stderr) == (1, True)
    for entry in ("rank", "rank=", "rank=8,x", "rank=1..", "rank=[1]"):
        wrong = await shell("train", files[0], "--sweep", entry)
        assert (wrong.exit_code, "not understood" in wrong.stderr) == (1, True), entry


def test_every_setting_that_has_a_flag_is_a_flag_of_train() -> None:
    command = typer.main.get_group(app).commands["train"]
    found = {option: param for param in command.params for option in param.opts}
    methods = {one.name: one for method in METHODS.values() for one in method.settings}
    declared = {**RUN, **JOB, **LORA_ASKED, **OWN, **methods}
    flags = {setting.flag: setting for setting in declared.values() if setting.flag}
    assert len(flags) == len([one for one in declared.values() if one.flag]) > 12
    for flag, setting in flags.items():
        assert (found[flag].name, getattr(found[flag], "help", "")) == (setting.name, setting.help)


async def test_settings_on_the_command_line_are_those_of_the_job(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(TRAINING_ROWS)
    given = ("--epochs", "2", "--batch-size", "3", "--learning-rate", "0.01", "--rank", "4", "--publish", "never")
    job = json.loads(await shell.ok("train", str(tmp_path / "a.jsonl"), *given, "--no-wait", "--json"))
    assert (job["hyperparameters"]["n_epochs"], job["hyperparameters"]["batch_size"]) == (2, 3)
    assert (job["learning_rate"], job["lora"]["rank"], job["publish"]) == (0.01, 4, "never")
    assert job["early_stopping"] in {None, 0}, "a switch that is not there says nothing"
    assert "cancelled" in await shell.ok("jobs", "cancel", job["id"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--method", "ppo"), "method"),
        (("--rank", "9999"), "rank"),
        (("--epochs", "99999"), "n_epochs"),
        (("--learning-rate", "7"), "learning_rate"),
        (("--name", "Not/aName"), "name"),
        (("--suffix", "a b"), "suffix"),
        (("--init-from", "nobody"), "nobody"),
        (("--sweep", "rank=8,16", "--trials", "9999"), "trials"),
        (("--sweep", "colour=1,2"), "colour"),
        (("--sweep", "rank"), "not understood"),
        (("--learning-rate", "inf"), "learning_rate cannot be sent"),
        (("--sweep", "learning_rate=1e-4..Infinity"), "sweep.learning_rate.max cannot be sent"),
        (("--validation", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
async def test_train_checks_its_settings_before_it_uploads(
    shell: Shell, tmp_path: Path, options: tuple[str, ...], word: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(TRAINING_ROWS)
    wrong = await shell("train", str(path), *options, "--no-wait")
    assert wrong.exit_code == 1, wrong.output
    assert word in wrong.stderr
    weighted = await shell("train", f"{path}=0.5", *options, "--no-wait")
    assert weighted.exit_code == 1
    assert json.loads(await shell.ok("files", "list", "--json") or "null") is None


async def test_train_asks_whether_it_may_measure_on_a_file_before_it_uploads(shell: Shell, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in ("a", "b", "c")]
    for path in paths:
        path.write_text(TRAINING_ROWS)
    first, second, third = map(str, paths)
    refused = await shell("train", first, second, "--validation", third, "--no-wait")
    assert (refused.exit_code, "leave validation_file out" in " ".join(refused.stderr.split())) == (1, True)
    assert json.loads(await shell.ok("files", "list", "--json") or "null") is None
    job = json.loads(await shell.ok("train", first, "--validation", third, "--no-wait", "--json"))
    assert job["validation_file"] not in {None, job["training_file"]}
    assert "cancelled" in await shell.ok("jobs", "cancel", job["id"])


async def test_train_refuses_what_is_no_file(shell: Shell, tmp_path: Path) -> None:
    missing = await shell("train", "nothing.jsonl")
    assert (missing.exit_code, "nothing.jsonl" in missing.stderr) == (1, True)
    path = tmp_path / "bad.jsonl"
    path.write_text("not json\n")
    bad = await shell("train", str(path))
    assert (bad.exit_code, "cannot be used" in bad.stderr) == (1, True)
    assert "fox" not in await shell.ok("jobs", "list")


async def test_adapters(shell: Shell, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    for seed in (1, 2):
        await shell.ok("adapters", "import", "fox", str(make_adapter(seed)))
    listed = [json.loads(line) for line in (await shell.ok("adapters", "list", "--json")).splitlines()]
    assert [(adapter["name"], adapter["version"]) for adapter in listed] == [("fox", 2)]
    assert "version 1" in await shell.ok("adapters", "rollback", "fox", "1")
    target = tmp_path / "out.zip"
    await shell.ok("adapters", "download", "fox", "-o", str(target))
    assert "adapter_config.json" in zipfile.ZipFile(target).namelist()
    assert "is deleted" in await shell.ok("adapters", "delete", "fox")
    assert (await shell("adapters", "delete", "fox")).exit_code == 1


async def test_doctor_finds_the_server(shell: Shell) -> None:
    result = await shell("doctor")
    assert "ready at http://127.0.0.1:" in result.output
