"""Write the client's types of a job's settings from the service's declaration of them; `--check` only compares.

The client needs nothing of the service: what it knows of the settings is this text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tenora.training.kinds.table import KINDS, OWN
from tenora.training.methods.table import METHODS
from tenora.training.settings import BY_THEMSELVES, ESTIMATED, HYPERPARAMETERS, ROWS, SETTINGS, Setting
from tenora.training.spec import LORA_ASKED, SWEPT, TRIAL

TARGET = Path(__file__).parents[1] / "src/tenora_client/settings.py"


def literal(words: Iterable[str]) -> str:
    """The type of these words."""
    return f"Literal[{', '.join(json.dumps(word) for word in words)}]"


def kind_of(setting: Setting) -> str:
    """The type of a value in a request."""
    kind = plain(setting)
    if setting.auto:
        return f'{kind} | Literal["auto"]'
    if setting.every:
        return f"{kind} | {literal([setting.every])}"
    return f"bool | {kind}" if setting.true else kind


def plain(setting: Setting) -> str:
    """The type of a value that is no word for others."""
    if setting.kind is tuple:
        return "Sequence[str]"
    return literal(setting.choices) if setting.choices else setting.kind.__name__


def text() -> str:
    """The module."""
    lines = [
        '"""Settings of a job. Written by `clients/python/scripts/settings.py`, from the service\'s: do not edit."""',
        "",
        "from __future__ import annotations",
        "",
        "from collections.abc import Sequence",
        "from typing import Literal, Required, TypedDict",
        "",
        "from tenora_client.api_object import ApiObject, Part",
        "from tenora_client.ranges import Range, RangeParams",
        "",
        f"MethodName = {literal(METHODS)}",
    ]
    return "\n".join([*lines, *questions(), *answers()]) + "\n"


def questions() -> Iterator[str]:
    """What a job may be asked for."""
    told = "absent means the server's default, which is meant to work"
    by_themselves = {name: HYPERPARAMETERS[name] for name in HYPERPARAMETERS if name in BY_THEMSELVES}
    others = {name: setting for name, setting in SETTINGS.items() if name not in ROWS}
    yield from asked("RowParams", f"How rows are read; {told}.", ROWS)
    yield from asked("Settings", f"How a job trains; {told}.", by_themselves | others, base="RowParams")
    yield from asked("SharedHyperparameters", "Those that all methods have.", HYPERPARAMETERS)
    for name, method in METHODS.items():
        options: dict[str, str | Setting] = {"hyperparameters": "SharedHyperparameters"}
        if settings := {one.name: one for one in method.settings if not one.at}:
            own = f"{title(name)}Hyperparameters"
            yield from asked(own, f"Those of a job that {method.summary}.", settings, base="SharedHyperparameters")
            options = {"hyperparameters": own}
        for group, members in method.options.items():
            own = f"{title(name)}{title(group)}Params"
            if group:
                yield from asked(own, f"{title(group)} of a job that {method.summary}.", members)
            options |= {group: own} if group else members
        yield from asked(f"{title(name)}Params", f"Options of the method {name}.", options)
    params = {name: f"{title(name)}Params" for name in METHODS}
    told_type = {"type": "Required[MethodName]"}
    yield from asked("MethodParams", "How to train: a type, and its options.", told_type | params)
    yield from asked("LoraParams", f"The adapter; {told}.", LORA_ASKED)
    every = {"type": f"Required[{literal(KINDS)}]", **OWN}
    what = "What the adapter is: a type, and those settings that it has."
    yield from asked("AdapterParams", what, every, base="LoraParams")
    values = {name: f"Sequence[{setting.kind.__name__}] | RangeParams" for name, setting in SWEPT.items()}
    yield from asked("SweptParams", "Values to try, one by one or as a range.", values)


def asked(name: str, summary: str, fields: Mapping[str, Any], *, base: str = "TypedDict") -> Iterator[str]:
    """A class of a request, every field of which may be absent."""
    yield from ("", "", f"class {name}({base}, total=False):", f'    """{summary}"""', "")
    for field, setting in fields.items():
        if isinstance(setting, str):
            yield f"    {field}: {setting}"
        else:
            yield f"    {field}: {kind_of(setting)}"
            yield from wrapped(f"{setting.help.split('. ')[0].rstrip('.')}; {setting.words}.")


def title(name: str) -> str:
    """A method's name as the beginning of a class's."""
    return name.replace("_", " ").title().replace(" ", "")


def answers() -> Iterator[str]:
    """The parts of a job's answer."""
    every = {one.name: one for method in METHODS.values() for one in method.hyperparameters.values()}
    yield from part("Hyperparameters", 'Of a job\'s method; "auto" until the files have been read.', every, auto=True)
    inner: dict[str, Any] = {"hyperparameters": "Hyperparameters"}
    for method in METHODS.values():
        for group, settings in method.options.items():
            own = f"{title(group)}Options"
            if group:
                yield from part(own, f"{title(group)} of a method.", settings, auto=True)
            inner |= {group: own} if group else settings
    yield from part("MethodOptions", "Of one method.", inner, auto=True)
    options = dict.fromkeys(METHODS, "MethodOptions")
    yield from part("Method", "How a job trains: the options of its type are there.", options, "    type: str")
    shape = "The adapter; whole once the files have been read, but for what a sweep still chooses."
    yield from part("Lora", shape, LORA_ASKED)
    said = "The adapter, of any type; what its type has is there."
    yield from part("AdapterSettings", said, OWN, '    type: str = "lora"', base="Lora")
    yield from part("SweptValues", "The values to try.", dict.fromkeys(SWEPT, "Sequence[float] | Range"))
    yield from part("TrialSettings", "Of a trial of a sweep.", TRIAL)
    yield from part("JobSettings", "A job's settings as they are used.", SETTINGS, base="ApiObject")
    yield from part("EstimatedSettings", "Those that an estimate repeats.", ESTIMATED, auto=True, base="ApiObject")


def part(
    name: str,
    summary: str,
    fields: Mapping[str, Any],
    *first: str,
    auto: bool = False,
    base: str = "Part",
) -> Iterator[str]:
    """A class of an answer, with None where the server says nothing."""
    yield from ("", "", f"class {name}({base}):", f'    """{summary}"""', "", *first)
    for field, setting in fields.items():
        kind = setting if isinstance(setting, str) else "str" if setting.choices else plain(setting)
        if not isinstance(setting, str):
            kind += " | str" if setting.every else ""
            kind += ' | Literal["auto"]' if auto and setting.auto else ""
        yield f"    {field}: {kind} | None = None"


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
