"""Section `tokens` of the server's settings: bearer tokens of clients and their scopes. Reads no file."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mal_server.config.model_config import ModelName
from mal_train.core.secrets import is_secret_reference
from mal_train.core.yaml_config import Strict

Scope = Literal["label", "evaluate", "admin"]


class TokenSetting(Strict):
    """One client's token."""

    name: ModelName
    token: str
    scopes: tuple[Scope, ...] = Field(min_length=1)
    data_folders: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if not is_secret_reference(self.token):
            raise ValueError("token: a secret in the settings file; give file:PATH or env:NAME")
        return self
