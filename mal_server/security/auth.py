"""Who may call what: bearer tokens and their scopes. Knows nothing of gRPC's handlers or of statuses.

Without tokens everybody may call everything. With tokens every call but a health check must carry one:

    authorization: Bearer <token>

    label      LabelingService
    evaluate   EvaluationService
    admin      both, and what changes the served models

Any token may ask ModelService what there is, and reflection. Tokens are
kept as digests only; `adopt` changes them while the server runs.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mal_server.config.tokens import Scope, TokenSetting
from mal_server.errors import PermissionDenied, Unauthenticated
from mal_train.core.errors import ConfigError

MAX_TOKEN_BYTES = 4096
MIN_TOKEN_CHARS = 16
HEALTH_PREFIX = "/grpc.health.v1."
"""Open to everybody: load balancers and supervisors hold no token."""

SCOPES: Mapping[str, Scope] = {
    "/mal.v1.LabelingService/": "label",
    "/mal.v1.EvaluationService/": "evaluate",
    "/mal.v1.ModelService/LoadModel": "admin",
    "/mal.v1.ModelService/UnloadModel": "admin",
}


@dataclass(frozen=True)
class TokenScopes:
    """One token. `digest` is the SHA-256 of its text; equal lengths make the comparison's time say nothing."""

    name: str
    digest: bytes
    scopes: frozenset[Scope]


class TokenAuthenticator:
    """Decides about calls.

    Args:
        grants: the known tokens; none = nobody is asked.
        is_private: nobody else reaches the server, so that without tokens its callers may change the models, too.
    """

    def __init__(self, grants: Iterable[TokenScopes] = (), *, is_private: bool = False) -> None:
        self._grants = tuple(grants)
        self._is_private = is_private

    @property
    def names(self) -> tuple[str, ...]:
        """Of the known tokens, in the order of the settings."""
        return tuple(grant.name for grant in self._grants)

    def adopt(self, other: "TokenAuthenticator") -> bool:
        """Knows the other's tokens from now on, and no others; whether that changes anything.

        Calls that were let in before are not ended.
        """
        changed = self._grants != other._grants
        self._grants = other._grants
        return changed

    def caller(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """Name of the token that a call shows; empty where none is needed.

        Args:
            method: "/package.Service/Method".
            metadata: of the call.

        Raises:
            UnknownCaller: no token, or one that is not known.
            NotAllowed: the token lacks the scope of the method.
        """
        if method.startswith(HEALTH_PREFIX):
            return ""
        needed = next((scope for prefix, scope in SCOPES.items() if method.startswith(prefix)), None)
        if not self._grants:
            if needed == "admin" and not self._is_private:
                raise PermissionDenied(
                    f"{method.removeprefix('/')} needs the scope 'admin', and a server that other machines reach gives "
                    "it by token alone; put tokens into its settings"
                )
            return ""
        grant = self._grant(metadata)
        if needed is not None and not grant.scopes & {needed, "admin"}:
            raise PermissionDenied(
                f"token {grant.name!r} lacks the scope {needed!r} that {method.removeprefix('/')} needs; it has "
                f"{', '.join(sorted(grant.scopes))}"
            )
        return grant.name

    def _grant(self, metadata: Iterable[tuple[str, str | bytes]]) -> TokenScopes:
        header = next((value for key, value in metadata if key == "authorization"), None)
        if header is None:
            raise Unauthenticated("no token; send the metadata 'authorization: Bearer <token>'")
        kind, _, token = (header if isinstance(header, str) else header.decode("latin-1")).partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        # Every token is compared, also after a match: the time must not tell which one came close.
        found = [grant for grant in self._grants if hmac.compare_digest(grant.digest, digest)]
        if kind.lower() != "bearer" or not found:
            raise Unauthenticated("the token is not known to this server")
        return found[0]


def read_tokens(settings: Sequence[TokenSetting], *, is_private: bool = False) -> TokenAuthenticator:
    """The configured tokens; `is_private` as in `TokenAuthenticator`.

    Raises:
        ConfigError: a file or variable that is missing, a token that is too short, holds blanks or stands twice; the
            message never holds the token.
    """
    grants = [
        TokenScopes(
            one.name,
            hashlib.sha256(_read_secret(one.token, f"tokens: {one.name!r} ({one.token})").encode()).digest(),
            frozenset(one.scopes),
        )
        for one in settings
    ]
    names = {grant.digest: grant.name for grant in reversed(grants)}
    for grant in grants:
        if names[grant.digest] != grant.name:
            raise ConfigError(f"tokens: {names[grant.digest]!r} and {grant.name!r} are the same token")
    return TokenAuthenticator(grants, is_private=is_private)


def read_resume_key(setting: str | None) -> bytes:
    """The key that seals evaluation records; a fresh one where the settings name none. Raises as `read_tokens`."""
    if setting is None:
        return secrets.token_bytes(32)
    return hashlib.sha256(_read_secret(setting, f"resume_key ({setting})").encode()).digest()


def _read_secret(setting: str, where: str) -> str:
    form, _, name = setting.partition(":")
    if form == "env":
        text = os.environ.get(name)
        if text is None:
            raise ConfigError(f"{where}: the environment has no such variable")
    else:
        try:
            with Path(name).open("rb") as file:
                text = file.read(MAX_TOKEN_BYTES + 1).decode("ascii", "replace")
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    token = text.strip()
    if not MIN_TOKEN_CHARS <= len(token) <= MAX_TOKEN_BYTES:
        raise ConfigError(
            f"{where}: a token has {MIN_TOKEN_CHARS} to {MAX_TOKEN_BYTES} characters; make one with "
            "`openssl rand -hex 32`"
        )
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError(f"{where}: a token is one word of printable ASCII characters")
    return token
