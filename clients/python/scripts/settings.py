"""Write the client's types of a job's settings from the service's declaration of them; `--check` only compares.

The client needs nothing of the service: what it knows of the settings is this text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tenora.training.methods.table import METHODS
from tenora.training.settings import BY_THEMSELVES, HYPERPARAMETERS, RUN, SETTINGS, Setting
from tenora.training.spec import LORA, TrialSpec

TARGET = Path(__file__).parents[1] / "src/tenora_client/settings.py"


def literal(words: Iterable[str]) -> str:
    """The type of these words."""
    return f"Literal[{', '.join(json.dumps(word) for word in words)}]"


def kind_of(setting: Setting) -> str:
    """The type of a value in a request."""
    kind = setting.kind.__name__
    if setting.choices:
        return literal(setting.choices)
    if setting.auto:
        return f'{kind} | Literal["auto"]'
    return f"bool | {kind}" if setting.true else kind


def text() -> str:
    """The module."""
    fields = {name: HYPERPARAMETERS[name] for name in HYPERPARAMETERS if name in BY_THEMSELVES} | dict(SETTINGS)
    own = {name: [setting.name for setting in method.settings] for name, method in METHODS.items()}
    lines = [
        '"""Settings of a job. Written by `clients/python/scripts/settings.py`, from the service\'s: do not edit."""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import Literal, TypedDict",
        "",
        "from tenora_client.api_object import Part",
        "",
        f"MethodName = {literal(METHODS)}",
        *(
            f"# Of {name} alone, among the hyperparameters of its method: {', '.join(names)}."
            for name, names in own.items()
            if names
        ),
        "",
        "",
        "class Settings(TypedDict, total=False):",
        '    """How a job trains; absent means the server\'s default, which is meant to work."""',
        "",
    ]
    for name, setting in fields.items():
        sentence = f"{setting.help.split('. ')[0].rstrip('.')}; {setting.words}."
        lines += [f"    {name}: {kind_of(setting)}", *wrapped(sentence)]
    return "\n".join([*lines, *answers()]) + "\n"


def answers() -> Iterator[str]:
    """The parts of a job's answer."""
    every = {one.name: one for method in METHODS.values() for one in method.hyperparameters.values()}
    trial = {name: (LORA | RUN)[name] for name in TrialSpec.__struct_fields__}
    yield from part("Hyperparameters", 'Of a job\'s method; "auto" until the files have been read.', every, auto=True)
    yield from part("MethodOptions", "Of one method.", {"hyperparameters": "Hyperparameters"})
    options = dict.fromkeys(METHODS, "MethodOptions")
    yield from part("Method", "How a job trains: the options of its type are there.", options, "    type: str")
    yield from part("LoraShape", "Of an adapter to train.", LORA)
    yield from part("TrialSettings", "Of a trial of a sweep.", trial)


def part(
    name: str, summary: str, fields: Mapping[str, Setting] | Mapping[str, str], *first: str, auto: bool = False
) -> Iterator[str]:
    """A class of an answer, with None where the server says nothing."""
    yield from ("", "", f"class {name}(Part):", f'    """{summary}"""', "", *first)
    for field, setting in fields.items():
        kind = setting if isinstance(setting, str) else "str" if setting.choices else setting.kind.__name__
        words = ' | Literal["auto"]' if auto else ""
        yield f"    {field}: {kind}{words} | None = None"


def wrapped(sentence: str) -> list[str]:
    """The sentence as a docstring of a field, within the line length."""
    room, found = 120 - 4, ['"""']
    for word in sentence.split():
        if len(found[-1]) + len(word) + 1 + 3 > room:
            found.append(word)
        else:
            found[-1] += word if found[-1] == '"""' else f" {word}"
    found[-1] += '"""'
    return [f"    {line}" for line in found]


def main() -> int:
    """Write it, or say whether it is fresh."""
    fresh = TARGET.exists() and TARGET.read_text(encoding="utf-8") == text()
    if "--check" in sys.argv[1:]:
        return 0 if fresh else 1
    TARGET.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
