"""The caller of the running call: callers take turns in the queues, and each has a share of them.

With tokens that is the name of the token, however many connections use it. Without tokens nobody is known by name, and
the caller is the connection: a program has one, so two programs are two callers even on one machine or behind one
address. A caller without a token may open more connections to get more turns; only tokens prevent that.
"""

from contextvars import ContextVar
from typing import Any

from mal_server.security.auth import TokenScopes

current_caller: ContextVar[str] = ContextVar("current_caller", default="")
"""Set by the interceptor; each call runs in a task, and so in a context, of its own."""


def caller_of(token: TokenScopes | None, context: Any) -> str:
    """Returns the caller of a call; `context` is that of gRPC."""
    return str(context.peer()) if token is None else token.name
