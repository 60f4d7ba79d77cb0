"""Section `tokens` of the server's settings: the bearer tokens that clients may present, and their scopes."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mal_server.config.model_config import ModelName
from mal_train.core.yaml_config import Strict

Scope = Literal["label", "evaluate", "admin"]


class TokenSetting(Strict):
    """One client's token."""

    name: ModelName
    token: str
    scopes: tuple[Scope, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _secret_stays_elsewhere(self) -> Self:
        if not self.token.startswith(("file:", "env:")):
            raise ValueError("token: give file:PATH or env:NAME; the token itself does not belong into this file")
        return self
