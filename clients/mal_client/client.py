"""`Client` and `AsyncClient`, gathered here under one name for callers."""

from mal_client.async_client import AsyncClient
from mal_client.blocking_client import Client
from mal_client.transport.client_base import DEFAULT_TIMEOUT_S

__all__ = ["DEFAULT_TIMEOUT_S", "AsyncClient", "Client"]
