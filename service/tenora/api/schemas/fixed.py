"""Fields of the protocol that change nothing here: the values that mean so are taken, any other is refused by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from tenora.errors import InvalidRequestError


def only(*allowed: Any, why: str) -> AfterValidator:
    """A validator that takes these values alone; `why` says to a client what to do about another one."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if value not in allowed:
            raise InvalidRequestError(why, code="unsupported_parameter", param=str(info.field_name))
        return value

    return AfterValidator(check)


def nothing(why: str) -> AfterValidator:
    """A validator of a list within other parts that must be empty; the error's place is the list's."""

    def check(value: list[Any] | None) -> list[Any] | None:
        if value:
            raise PydanticCustomError("unsupported_parameter", "{why}", {"why": why})
        return value

    return AfterValidator(check)


_LEAVE_OUT = "Leave the field out."

# What OpenAI's clients send with every request, or label their requests with.
Label = Annotated[str | None, Field(max_length=512, description="Accepted and not used.")]
Metadata = Annotated[dict[str, Any] | None, Field(max_length=16, description="Accepted and not used.")]
Store = Annotated[bool | None, only(False, why=f"Answers are not stored. {_LEAVE_OUT}")]
ServiceTier = Annotated[
    str | None, only("auto", "default", why=f'There is one service tier. {_LEAVE_OUT[:-1]}, or send "auto".')
]
Modalities = Annotated[
    list[str] | None, only(["text"], why=f'Answers are text alone. {_LEAVE_OUT[:-1]}, or send ["text"].')
]

# What another server could do and this one does not.
Tools = Annotated[Any, only([], why=f"Tools are not supported yet. {_LEAVE_OUT}")]
ToolCalls = Annotated[
    list[Any] | None, nothing("tools are not supported yet, so say in content what was called and what it gave")
]
Annotations = Annotated[list[Any] | None, nothing("sources are not supported; leave the field out")]
ToolChoice = Annotated[Any, only("none", why=f'Tools are not supported yet. {_LEAVE_OUT[:-1]}, or send "none".')]
TextFormat = Annotated[Any, only({"type": "text"}, why=f'Only {{"type": "text"}} is supported yet. {_LEAVE_OUT}')]
ClientTemplate = Annotated[
    Any, only(why=f"A client may not send a chat template; the model's own is used. {_LEAVE_OUT}")
]
TemplateArguments = Annotated[Any, only({}, why=f"A client may not steer the chat template. {_LEAVE_OUT}")]
Unsupported = Annotated[
    Any, only(why=f"The field is not supported. {_LEAVE_OUT}"), Field(description="Not supported but as null.")
]
