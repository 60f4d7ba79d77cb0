"""The public API: `Client` and `AsyncClient`.

>>> from mal_client.client import Client
>>> with Client("localhost:50051") as client:  # doctest: +SKIP
...     labels = client.label_image("street.jpg", [[10, 20, 50, 80]])
"""

from mal_client.async_client import AsyncClient
from mal_client.blocking_client import Client
from mal_client.transport.client_base import DEFAULT_TIMEOUT_S

__all__ = ["DEFAULT_TIMEOUT_S", "AsyncClient", "Client"]
