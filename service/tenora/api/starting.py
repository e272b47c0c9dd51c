"""HTTP while the service starts: the probes say how far it is, everything else is told to come back."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tenora.api.errors import error_response
from tenora.api.start_state import StartState
from tenora.errors import UnavailableError


class Starting:
    """The ASGI application from the first moment on.

    Attributes:
        app: what answers once the service has started; None until then.
    """

    def __init__(self, state: StartState) -> None:
        self.app: ASGIApp | None = None
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})
        await self._answer(scope)(scope, receive, send)

    def _answer(self, scope: Scope) -> JSONResponse:
        if scope["path"] == "/livez":  # a start that stands still ends the process by itself
            return JSONResponse({"status": "ok"})
        if scope["path"] in {"/readyz", "/health"}:
            return JSONResponse(self._state.body(), 503)
        error = UnavailableError(f"The server is starting ({self._state.text}); retry in a moment.", code="starting")
        return error_response(scope, error)
