"""Errors that only a server can have; mal_server.interceptors gives them, and all others, their status.

    MalError
    ├── InputError
    │   ├── RequestRefused    fields of a request break the contract; nothing was started
    │   ├── UnknownCaller     a call shows no token, or one that is not known
    │   └── NotAllowed        its token lacks the method's scope
    └── NotReady              the model is not loaded yet

`Overloaded` stays in the batcher, which knows of nothing else.
"""

from collections.abc import Sequence

from mal_train.errors import InputError, MalError


class RequestRefused(InputError):
    """A request breaks the contract. `violations` are pairs (path of the field, what is wrong with it)."""

    def __init__(self, violations: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {text}" for field, text in violations))
        self.violations = tuple(violations)


class UnknownCaller(InputError):
    """A call whose caller is not known."""


class NotAllowed(InputError):
    """A call whose caller is known and may not make it."""


class NotReady(MalError):
    """No model is loaded yet; the same call may succeed soon."""
