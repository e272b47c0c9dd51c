"""README.md of a downloaded adapter: Hugging Face's front matter, then the card as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tenora.adapters.kinds.table import NAMED
from tenora.control.adapters.card_tables import code, number, share, signed, table, time
from tenora.control.adapters.full_section import full_section
from tenora.control.adapters.head_section import head_section
from tenora.control.adapters.records import AdapterRecord
from tenora.training.methods.method import PER_TOKEN, Method
from tenora.training.methods.table import METHODS, USUAL, find_unit

README_NAME = "README.md"
_SHOWN_POINTS = 12  # of the curve
_TAGS = ("text-generation", "tenora")
_LOADED = {
    "peft": ("from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "path/of/this/directory")'),
    "adapters": (
        "import adapters",
        """adapters.init(base)
name = base.load_adapter("path/of/this/directory", use_safetensors=True)
base.set_active_adapters(name)""",
    ),
}
"""How a library gets at an adapter: what is imported, and what loads it into `base`."""
_LIBRARIES = {"peft": "peft", "adapters": "adapter-transformers"}  # as the hub calls them


def model_card(record: AdapterRecord) -> str:
    """The text; equal records give equal text.

    It is made for whoever asks, from that tenant's own row: the stored files are shared by all who have the same
    weights, so nothing of where a version comes from may lie beside them.
    """
    said: Mapping[str, Any] = record.evaluation or {}
    parts = [
        _front_matter(record),
        f"# {record.name}, version {record.version}",
        _about(record, said),
        *sections(said),
        _use(record, said),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def sections(said: Mapping[str, Any]) -> list[str]:
    """What is said of any result; empty where there is nothing."""
    parts = (
        _verdicts,
        head_section,
        _quality,
        _replaced,
        _few_shot,
        _tasks,
        _more,
        full_section,
        _course,
        _lineage,
        _notes,
    )
    return [part(said) for part in parts]


def _front_matter(record: AdapterRecord) -> str:
    """YAML. A JSON string is a YAML string, whatever stands in it."""
    library = _LIBRARIES[NAMED[record.method].library]
    tags = [record.method, library, *_TAGS, f"base_model:adapter:{record.base_model}"]
    lines = [
        f"base_model: {json.dumps(record.base_model)}",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _about(record: AdapterRecord, said: Mapping[str, Any]) -> str:
    origin = "trained by Tenora" if record.source == "job" else "imported into Tenora"
    rows = [
        ("Base model", code(record.base_model)),
        ("Rank", record.rank),
        ("Modules", ", ".join(map(code, record.target_modules))),
        ("Weights", f"{record.bytes:,} bytes"),
        ("Digest", code(record.digest)),
        ("Made", time(record.created_at)),
    ]
    if said.get("steps"):
        rows.append(("Steps", f"{said.get('best_step')} of {said['steps']} (the best held-out loss)"))
    if said.get("trained_tokens"):
        rows.append(("Trained tokens", f"{said['trained_tokens']:,}"))
    if held := (said.get("lineage") or {}).get("rows"):
        rows.append(("Rows trained on", f"{held['trained']:,}"))
        rows.append(("Rows held out", f"{held['held_out']:,}" if held["held_out"] else "none; cross-validated"))
        longest = "" if held["max_seq_length"] is None else f" to {held['max_seq_length']} tokens"
        rows.append((f"Rows cut{longest}", f"{held['cut']:,}" if held["truncate"] else "none; longer ones are refused"))
    return f"{NAMED[record.method].title}, {origin}.\n\n" + table(("", ""), rows)


def _verdicts(said: Mapping[str, Any]) -> str:
    """Whether it is any good, before all figures."""
    found: Mapping[str, Mapping[str, Any]] = said.get("verdicts") or {}
    names = {
        "start": "What training started from",
        "base": "Base",
        "few_shot_base": "Few-shot base",
        "replaced": "The version that its name meant",
    }
    lines = []
    for name, label in names.items():
        if name in found:
            reason = f" ({found[name]['reason'].rstrip('.')})" if found[name].get("reason") else ""
            lines.append(f"- {label}: **{found[name]['verdict']}**{reason}")
    return "## Verdicts\n\nHow this adapter does on held-out rows, beside:\n\n" + "\n".join(lines) if lines else ""


def _quality(said: Mapping[str, Any]) -> str:
    found = said.get("held_out")
    if not found:
        return ""
    unit = find_unit(found.get("unit", PER_TOKEN.name))
    text = (
        f"Measured on {found['rows']} {unit.examples} with {found['tokens']:,} learned tokens ({said['source']}), in "
        f"{unit.name}; the interval is a paired bootstrap over {unit.examples}, 95%."
    )
    method = _method(said)
    if method.loss_note:
        text += f" {method.loss_note}"
    if said.get("trials", 1) > 1:
        text += (
            f" **These rows also chose this adapter among {said['trials']} trials of a sweep, so its figures look "
            "better than they would on fresh rows.**"
        )
    rows = _compared(found, "What training started from")
    if said.get("valid_accuracy") is not None:
        curve = said.get("curve") if method.start_has_accuracy else None
        start = f" (at the start {share(curve[0]['valid_accuracy'])})" if curve else ""
        rows.append((method.accuracy_label, f"{share(said['valid_accuracy'])}{start}"))
    base = said.get("base")
    if base and base != found:
        rows += [(f"Base, on {base['rows']} of them", number(base["other_loss"])), *_difference(base, "the base")]
    return f"## Held-out loss\n\n{text}\n\n" + table(("", "loss"), rows)


def _method(said: Mapping[str, Any]) -> Method:
    """That made it; cards of before there were several say none."""
    settings = (said.get("lineage") or {}).get("settings") or {}
    return METHODS.get(settings.get("method", USUAL.name), USUAL)


def _replaced(said: Mapping[str, Any]) -> str:
    found = said.get("replaced")
    if not found:
        return ""
    name = f"Version {found['version']} of {found['name']}"
    against = found["comparison"]
    if not against:
        return ""
    text = (
        f"{name} (`{found['digest'][:12]}`) is what the name meant when this adapter was ready. On {against['rows']} "
        f"held-out rows that neither has learned ({against['tokens']:,} learned tokens), in {against['unit']}."
    )
    return "## Against the version in use\n\n" + text + "\n\n" + table(("", "loss"), _compared(against, name))


def _compared(found: Mapping[str, Any], other: str) -> list[tuple[str, Any]]:
    return [
        ("This adapter", number(found["adapter_loss"])),
        (other, number(found["other_loss"])),
        *_difference(found, ""),
    ]


def _difference(found: Mapping[str, Any], other: str) -> list[tuple[str, Any]]:
    of = f" to {other}" if other else ""
    interval = f"{signed(found['difference'])} ({signed(found['low'])} to {signed(found['high'])})"
    return [(f"Difference{of}", interval), (f"Verdict{of and f', beside {other}'}", f"**{found['verdict']}**")]


def _few_shot(said: Mapping[str, Any]) -> str:
    found = said.get("few_shot")
    if not found:
        return ""
    against = found["comparison"]
    text = (
        f"The base with {found['shots']} training rows in its prompt, on {against['rows']} of these rows "
        f"({against['tokens']:,} learned tokens)."
    )
    rows = [
        ("This adapter, no example in the prompt", number(against["adapter_loss"])),
        (f"Base, {found['shots']} examples in the prompt", number(against["other_loss"])),
        ("Base, no example", number(found["base_loss"])),
        (
            "Adapter against examples",
            f"{signed(against['difference'])} ({signed(against['low'])} to {signed(against['high'])})",
        ),
        ("Verdict", f"**{against['verdict']}**"),
    ]
    return "## Against examples in the prompt\n\n" + text + "\n\n" + table(("", "loss"), rows)


def _more(said: Mapping[str, Any]) -> str:
    rows: list[tuple[str, Any]] = []
    if found := said.get("forgetting"):
        change = f"{signed(found['change'])} ({number(found['base_loss'])} to {number(found['adapter_loss'])})"
        rows.append((f"Forgetting: loss change on a general text of {found['tokens']} tokens", change))
    if found := said.get("overfitting"):
        ratio = f"{found['verdict']} (last ÷ best held-out loss {found['ratio']:.3f})"
        rows.append(("Overfitting after the best evaluation", ratio))
    if said.get("near_duplicates") is not None:
        rows.append(("Held-out rows that are nearly training rows", said["near_duplicates"]))
    if found := said.get("parity"):
        if found["gap"] is not None:
            most = f"at most {found['tolerance']:g}, {found['dtype']}"
            gap = f"{found['gap']:.2g} nats over {found['tokens']} tokens ({most})"
            rows.append(("Largest gap between serving and training", gap))
        if found["effect"] is not None:
            rows.append(("Largest change to the base on these tokens", f"{found['effect']:.2g} nats"))
        rows.append(("Modules with trained weights", found["modules"]))
    return "## Checks\n\n" + table(("", ""), rows) if rows else ""


def _tasks(said: Mapping[str, Any]) -> str:
    found: Sequence[Mapping[str, Any]] = said.get("tasks") or ()
    if len(found) < 2:
        return ""
    rows = []
    for task in found:
        against = task["comparison"]
        losses = ["not measured"] * 4
        if against:
            interval = f"{signed(against['difference'])} ({signed(against['low'])} to {signed(against['high'])})"
            losses = [number(against["adapter_loss"]), number(against["other_loss"]), interval, against["verdict"]]
        rows.append((task["name"], f"{task['weight']:g}", task["trained"], task["held_out"], task["cut"], *losses))
    head = (
        "task",
        "weight",
        "rows trained on",
        "held out",
        "cut",
        "loss",
        "loss at the start",
        "difference",
        "verdict",
    )
    return "## Held-out loss by task\n\n" + table(head, rows)


def _course(said: Mapping[str, Any]) -> str:
    points: Sequence[Mapping[str, Any]] = said.get("curve") or ()
    if len(points) < 2:
        return ""
    best = said.get("best_step")
    stride = -(-len(points) // _SHOWN_POINTS)
    shown = [point for number, point in enumerate(points) if not number % stride or point["step"] == best]
    if shown[-1] is not points[-1]:
        shown.append(points[-1])
    rows = [
        (
            f"{point['step']} (the best)" if point["step"] == best else point["step"],
            number(point["valid_loss"]),
            share(point["valid_accuracy"]),
        )
        for point in shown
    ]
    return "## Evaluations\n\n" + table(("step", "held-out loss", "accuracy"), rows)


def _lineage(said: Mapping[str, Any]) -> str:
    found = said.get("lineage")
    if not found:
        return ""
    rows: list[tuple[str, Any]] = [("Job", code(found["job_id"])), ("Base model", code(found["base_model"]))]
    if base := found.get("base"):
        rows += _base(base)
    if parent := found["parent"]:
        rows.append(("Started from", f"{code(parent['name'])} {code(parent['digest'])}".strip()))
    rows += [
        (f"{one['purpose'].capitalize()} file", f"{code(one['id'])} sha256 {code(one['sha256'] or 'unknown')}")
        for one in found["files"]
    ]
    rows += [
        ("Seed", found["seed"]),
        *_split(found.get("rows")),
        ("Created", time(found["created_at"])),
        ("Finished", time(found["finished_at"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
    ]
    settings = [(name, code(json.dumps(value))) for name, value in found["settings"].items()]
    return "## Lineage\n\n" + table(("", ""), rows) + "\n\n### Settings\n\n" + table(("setting", "value"), settings)


def _split(held: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    return [] if held is None or held["split_seed"] is None else [("Seed of the held-out rows", held["split_seed"])]


def _base(base: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Where the base is to be had, and how to see that it is the same one."""
    rows: list[tuple[str, Any]] = []
    if base["kind"] == "catalogue":
        rows.append(("Base from", f"{code(base['member'])} in the wheel {code(base['source'])}"))
        rows.append(("SHA-256 of the wheel", code(base["revision"])))
    elif base["kind"] == "hub":
        revision = f" at {code(base['revision'])}" if base["revision"] else ""
        rows.append(("Base from", f"the hub, {code(base['source'])}{revision}"))
    else:
        rows.append(("Base from", f"the directory {code(base['source'])} of the machine that trained it"))
    return rows + [(f"SHA-256 of the base's {code(name)}", code(digest)) for name, digest in base["weights"].items()]


def _notes(said: Mapping[str, Any]) -> str:
    notes: Sequence[str] = said.get("notes") or ()
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def _use(record: AdapterRecord, said: Mapping[str, Any]) -> str:
    if not record.target_modules:
        return (
            "## Use\n\nThe heads read the base's hidden states and change none of them. Import the directory into "
            f'Tenora, and POST /classify {{"model": {json.dumps(record.name)}, "input": "..."}}.'
        )
    base: Mapping[str, Any] = (said.get("lineage") or {}).get("base") or {}
    name = json.dumps(record.base_model)
    before, argument, comment = "", name, "  # or where the base lies"
    if base.get("kind") == "hub" and base["revision"]:
        argument, comment = f"{name}, revision={json.dumps(base['revision'])}", ""
    elif base.get("kind") == "catalogue":
        before = f"# `tenora pull {record.base_model}` fetches the base and converts it.\n"
        argument, comment = json.dumps(f"path/to/.tenora/models/{record.base_model}"), ""
    elif base.get("kind") == "directory":
        argument, comment = json.dumps(f"path/to/{base['source']}"), "  # the weights have the SHA-256 above"
    imported, loaded = _LOADED[NAMED[record.method].library]
    return (
        f"## Use\n\n```python\n{imported}\nfrom transformers import AutoModelForCausalLM\n\n"
        f"{before}base = AutoModelForCausalLM.from_pretrained({argument}){comment}\n{loaded}\n```"
    )
