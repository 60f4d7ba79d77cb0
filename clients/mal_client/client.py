"""The public API: `Client` and `AsyncClient`.

>>> from mal_client.client import Client
>>> with Client("localhost:50051") as client:  # doctest: +SKIP
...     (label,) = client.label_image("street.jpg", [[10, 20, 50, 80]])  # x, y, width, height in px
>>> label.score, label.mask.shape, label.mask.dtype  # doctest: +SKIP
(0.91, (480, 640), dtype('bool'))

`mal_client.types` has the arguments and results, `mal_client.errors` the exceptions. `mal_client.overlay` draws labels
over an image, and `mal_client.model_admin` loads and unloads models of a server.
"""

from mal_client.async_client import AsyncClient
from mal_client.blocking_client import Client
from mal_client.transport.client_base import DEFAULT_TIMEOUT_S

__all__ = ["DEFAULT_TIMEOUT_S", "AsyncClient", "Client"]
