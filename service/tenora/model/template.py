"""Chat templates: Jinja as transformers renders it, in a sandbox. Free of torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tenora.errors import InvalidRequestError, UnsupportedModelError

# Names under which clients send a message's reasoning; templates read the first (gpt-oss reads the second).
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template.

    Raises:
        UnsupportedModelError: the template is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UnsupportedModelError(f"The base model's chat template is not valid Jinja: {error}.") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        special_tokens: Mapping[str, str],
    ) -> str:
        """Text of a conversation, equal to transformers' `apply_chat_template(…, tokenize=False)`.

        Raises:
            InvalidRequestError: the template refuses the messages (roles in the wrong order, say), or fails on them.
        """
        if not messages:
            raise InvalidRequestError("The conversation is empty; send at least one message.", param="messages")
        try:
            return self._template.render(
                messages=[_prepare(message) for message in messages],
                tools=None if tools is None else [_plain(tool) for tool in tools],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # A template is a program of the base model's author: whatever it stumbles over lies in these messages.
            raise InvalidRequestError(
                f"The base model's chat template cannot render these messages: {error}.", param="messages"
            ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's text in training templates; here it is plain."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    @staticmethod
    def _render(caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict(…)` without the class itself, whose attributes would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(…)` that refuses underscore names, as transformers' does."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # jinja2's own trick: `self` may be a keyword
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template cannot set the namespace attribute {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  # local time, as transformers


def _prepare(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without null fields (templates would print "None") and with the reasoning under each of its names."""
    prepared: dict[str, Any] = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((prepared[name] for name in _REASONING_FIELDS if name in prepared), None)
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    return prepared


def _plain(value: Any) -> Any:
    """A deep copy of JSON types only: a template must not reach methods of anything richer."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)
