"""README.md of a downloaded adapter: Hugging Face's front matter, then the card as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tenora.control.records import AdapterRecord

README_NAME = "README.md"
_TAGS = ("lora", "peft", "text-generation", "tenora")


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
        *(section(said) for section in (_verdicts, _quality, _replaced, _few_shot, _more, _tasks, _lineage, _notes)),
        _use(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(record: AdapterRecord) -> str:
    """YAML. A JSON string is a YAML string, whatever stands in it."""
    tags = [*_TAGS, f"base_model:adapter:{record.base_model}"]
    lines = [
        f"base_model: {json.dumps(record.base_model)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _about(record: AdapterRecord, said: Mapping[str, Any]) -> str:
    origin = "trained by Tenora" if record.source == "job" else "imported into Tenora"
    rows = [
        ("Base model", _code(record.base_model)),
        ("Rank", record.rank),
        ("Modules", ", ".join(map(_code, record.target_modules))),
        ("Weights", f"{record.bytes:,} bytes"),
        ("Digest", _code(record.digest)),
        ("Made", _time(record.created_at)),
    ]
    if said.get("steps"):
        rows.append(("Steps", f"{said.get('best_step')} of {said['steps']} (the best held-out loss)"))
    if said.get("trained_tokens"):
        rows.append(("Trained tokens", f"{said['trained_tokens']:,}"))
    return f"A LoRA adapter, {origin}.\n\n" + _table(("", ""), rows)


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
    return "## Verdicts\n\nThis adapter on held-out rows, beside:\n\n" + "\n".join(lines) if lines else ""


def _quality(said: Mapping[str, Any]) -> str:
    found = said.get("held_out")
    if not found:
        return ""
    pairs = found.get("unit") == "nats per pair"
    text = (
        f"Measured on {found['rows']} {'pairs' if pairs else 'rows'} with {found['tokens']:,} learned tokens "
        f"({said['source']}), in {found.get('unit', 'nats per token')}; the interval is a paired bootstrap over "
        f"{'pairs' if pairs else 'rows'}, 95%."
    )
    if pairs:
        text += " The loss is DPO's, log 2 where training started: what is lower prefers the chosen answers more."
    rows = _compared(found, "What training started from")
    base = said.get("base")
    if base and base != found:
        rows += [(f"Base, on {base['rows']} of them", _number(base["other_loss"])), *_difference(base, "the base")]
    return f"## Held-out loss\n\n{text}\n\n" + _table(("", "loss"), rows)


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
    return "## Against the version in use\n\n" + text + "\n\n" + _table(("", "loss"), _compared(against, name))


def _compared(found: Mapping[str, Any], other: str) -> list[tuple[str, Any]]:
    return [
        ("This adapter", _number(found["adapter_loss"])),
        (other, _number(found["other_loss"])),
        *_difference(found, ""),
    ]


def _difference(found: Mapping[str, Any], other: str) -> list[tuple[str, Any]]:
    of = f" to {other}" if other else ""
    interval = f"{_signed(found['difference'])} ({_signed(found['low'])} to {_signed(found['high'])})"
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
        ("This adapter, no example in the prompt", _number(against["adapter_loss"])),
        (f"Base, {found['shots']} examples in the prompt", _number(against["other_loss"])),
        ("Base, no example", _number(found["base_loss"])),
        (
            "Adapter against examples",
            f"{_signed(against['difference'])} ({_signed(against['low'])} to {_signed(against['high'])})",
        ),
        ("Verdict", f"**{against['verdict']}**"),
    ]
    return "## Against examples in the prompt\n\n" + text + "\n\n" + _table(("", "loss"), rows)


def _more(said: Mapping[str, Any]) -> str:
    rows: list[tuple[str, Any]] = []
    if found := said.get("forgetting"):
        change = f"{_signed(found['change'])} ({_number(found['base_loss'])} to {_number(found['adapter_loss'])})"
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
    return "## Checks\n\n" + _table(("", ""), rows) if rows else ""


def _tasks(said: Mapping[str, Any]) -> str:
    found = said.get("tasks")
    if not found:
        return ""
    return "## Held-out loss by task\n\n" + _table(
        ("task", "loss"), [(name, _number(loss)) for name, loss in found.items()]
    )


def _lineage(said: Mapping[str, Any]) -> str:
    found = said.get("lineage")
    if not found:
        return ""
    rows: list[tuple[str, Any]] = [("Job", _code(found["job_id"])), ("Base model", _code(found["base_model"]))]
    if parent := found["parent"]:
        rows.append(("Started from", f"{_code(parent['name'])} {_code(parent['digest'])}".strip()))
    rows += [
        (f"{one['purpose'].capitalize()} file", f"{_code(one['id'])} sha256 {_code(one['sha256'] or 'unknown')}")
        for one in found["files"]
    ]
    rows += [
        ("Seed", found["seed"]),
        ("Created", _time(found["created_at"])),
        ("Finished", _time(found["finished_at"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
    ]
    settings = [(name, _code(json.dumps(value))) for name, value in found["settings"].items()]
    return "## Lineage\n\n" + _table(("", ""), rows) + "\n\n### Settings\n\n" + _table(("setting", "value"), settings)


def _notes(said: Mapping[str, Any]) -> str:
    notes: Sequence[str] = said.get("notes") or ()
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def _use(record: AdapterRecord) -> str:
    return (
        "## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(record.base_model)})  # or where the base lies\n"
        'model = PeftModel.from_pretrained(base, "path/of/this/directory")\n```'
    )


def _table(head: tuple[str, str], rows: Iterable[tuple[Any, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _code(value: str) -> str:
    return f"`{value}`" if value else ""


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.4f}"


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
