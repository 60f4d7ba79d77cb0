"""Authenticates calls by bearer token and authorizes them by scope. Knows nothing of gRPC handlers or statuses.

With tokens, every call except a health check must carry one:

    authorization: Bearer <token>

    label      LabelingService
    evaluate   EvaluationService
    admin      every method, including those that change the served models

Every token allows the other methods of ModelService, and reflection. Without tokens every call is allowed, except that
a server that other machines can reach refuses to change its models. The server keeps only digests of tokens;
`TokenAuthenticator.replace` changes them while it runs.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mal_server.config.tokens import Scope, TokenSetting
from mal_server.errors import PermissionDenied, Unauthenticated
from mal_train.core.errors import ConfigError
from mal_train.core.secrets import is_token, read_secret

MAX_TOKEN_CHARS = 4096
MIN_TOKEN_CHARS = 16
HEALTH_PREFIX = "/grpc.health.v1."
"""Needs no token: load balancers and supervisors hold none."""

SCOPES: Mapping[str, Scope] = {
    "/mal.v1.LabelingService/": "label",
    "/mal.v1.EvaluationService/": "evaluate",
    "/mal.v1.ModelService/LoadModel": "admin",
    "/mal.v1.ModelService/UnloadModel": "admin",
}
"""Prefix of a method -> the scope that it needs."""


@dataclass(frozen=True)
class TokenScopes:
    """A known token and what it allows.

    Attributes:
        name: from the settings; appears in logs and messages.
        digest: SHA-256 of the token. All digests are equally long, so a comparison takes constant time.
        scopes: at least one.
        data_folders: names of the folders of the server that its requests may name; None: all.
    """

    name: str
    digest: bytes
    scopes: frozenset[Scope]
    data_folders: frozenset[str] | None = None


class TokenAuthenticator:
    """Checks the token of each call.

    Args:
        tokens: the known tokens; empty: no call needs one.
        is_private: only this machine reaches the server, so without tokens its clients may also change the models.
    """

    def __init__(self, tokens: Iterable[TokenScopes] = (), *, is_private: bool = False) -> None:
        self._tokens = tuple(tokens)
        self._is_private = is_private

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the known tokens, in the order of the settings."""
        return tuple(token.name for token in self._tokens)

    def replace(self, other: "TokenAuthenticator") -> bool:
        """Replaces the known tokens with those of another authenticator.

        Returns True if the tokens changed; `check` then finds the running calls whose token is gone.
        """
        changed = self._tokens != other._tokens
        self._tokens = other._tokens
        return changed

    def authenticate(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> TokenScopes | None:
        """Returns the token that a call carries; None if it needs none.

        Args:
            method: "/package.Service/Method".
            metadata: metadata of the call.

        Raises:
            Unauthenticated: no token or an unknown one.
            PermissionDenied: the token lacks the scope of the method.
        """
        if method.startswith(HEALTH_PREFIX):
            return None
        if not self._tokens:
            if _needed_scope(method) == "admin" and not self._is_private:
                raise PermissionDenied(
                    f"{method.removeprefix('/')} needs a token with the scope 'admin', because other machines can "
                    "reach this server; add tokens to its settings"
                )
            return None
        token = self._find(metadata)
        _authorize(method, token)
        return token

    def check(self, method: str, token: TokenScopes) -> None:
        """Checks the token of a call that runs already, after the known tokens were replaced.

        Raises:
            Unauthenticated: the token is no longer known.
            PermissionDenied: it lost the scope of the method, or its folders changed.
        """
        current = next((known for known in self._tokens if known.digest == token.digest), None)
        if current is None:
            raise Unauthenticated("the token of this call was revoked")
        _authorize(method, current)
        if current.data_folders != token.data_folders:
            raise PermissionDenied("the folders of the token of this call were changed; call again")

    def _find(self, metadata: Iterable[tuple[str, str | bytes]]) -> TokenScopes:
        header = next((value for key, value in metadata if key == "authorization"), None)
        if header is None:
            raise Unauthenticated("no token; send the metadata 'authorization: Bearer <token>'")
        scheme, _, text = (header if isinstance(header, str) else header.decode("latin-1")).partition(" ")
        digest = hashlib.sha256(text.strip().encode()).digest()
        # Compares every token, also after a match: the time must not reveal which one matched.
        matches = [token for token in self._tokens if hmac.compare_digest(token.digest, digest)]
        if scheme.lower() != "bearer" or not matches:
            raise Unauthenticated("the token is not known to this server")
        return matches[0]


def _needed_scope(method: str) -> Scope | None:
    return next((scope for prefix, scope in SCOPES.items() if method.startswith(prefix)), None)


def _authorize(method: str, token: TokenScopes) -> None:
    """Raises PermissionDenied if the token lacks the scope of the method."""
    needed = _needed_scope(method)
    if needed is not None and not token.scopes & {needed, "admin"}:
        raise PermissionDenied(
            f"token {token.name!r} lacks the scope {needed!r}, which {method.removeprefix('/')} needs; it has "
            f"{', '.join(sorted(token.scopes))}"
        )


def read_tokens(settings: Sequence[TokenSetting], *, is_private: bool = False) -> TokenAuthenticator:
    """Reads the configured tokens; `is_private` as in `TokenAuthenticator`.

    Raises:
        ConfigError: a file or variable is missing, a token has a wrong length or is not one word of printable ASCII, or
            two entries hold the same token. The message never contains the token.
    """
    tokens = [_read_token(setting) for setting in settings]
    first_names: dict[bytes, str] = {}
    for token in tokens:
        first = first_names.setdefault(token.digest, token.name)
        if first != token.name:
            raise ConfigError(f"tokens: {first!r} and {token.name!r} are the same token; give each client its own")
    return TokenAuthenticator(tokens, is_private=is_private)


def _read_token(setting: TokenSetting) -> TokenScopes:
    digest = _digest_of(setting.token, f"tokens: {setting.name!r}")
    folders = None if setting.data_folders is None else frozenset(setting.data_folders)
    return TokenScopes(setting.name, digest, frozenset(setting.scopes), folders)


def read_resume_key(reference: str | None) -> bytes:
    """Returns the key that seals resume tokens; a random one without a reference. Raises ConfigError."""
    return secrets.token_bytes(32) if reference is None else _digest_of(reference, "resume_key")


def _digest_of(reference: str, name: str) -> bytes:
    text = read_secret(reference, name).strip()
    if not MIN_TOKEN_CHARS <= len(text) <= MAX_TOKEN_CHARS:
        raise ConfigError(
            f"{name}: {reference}: {len(text)} characters; a secret has {MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS}; make "
            "one with `openssl rand -hex 32`"
        )
    if not is_token(text):
        raise ConfigError(f"{name}: {reference}: not one word of printable ASCII characters")
    return hashlib.sha256(text.encode()).digest()
