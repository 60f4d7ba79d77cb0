"""Accesses a task on a CVAT server through the CVAT SDK. Needs the extra `cvat`."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import unquote_to_bytes, urlsplit

from cvat_sdk import models
from cvat_sdk.api_client.rest import RESTClientObject
from cvat_sdk.core.client import AccessTokenCredentials, Client
from cvat_sdk.core.exceptions import CvatSdkException
from cvat_sdk.exceptions import OpenApiException
from urllib3.exceptions import HTTPError

from mal_client.errors import ClientError
from mal_client.integrations.cvat.task_plan import Json
from mal_train.core.proxies import proxy_of_url, refuse_plaintext, url_hint

MAX_RESPONSE_BYTES: Final = 256 * 1024 * 1024
"""Size limit of the annotations of a task, and of a frame, decompressed."""

_PIECE_BYTES: Final = 64 * 1024

_SDK_ERRORS: Final = (
    *(OpenApiException, CvatSdkException, HTTPError),
    # Raised by the SDK, the JSON parser and the parser of dates for answers of another form.
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError, RecursionError),
)


class CvatError(ClientError):
    """A call to the CVAT server failed."""


class SdkClient:
    """Implementation of `CvatClient` with the CVAT SDK; close it at the end.

    Args:
        url: address of the server, for example https://app.cvat.ai.
        task_id: ID of the task.
        token: a personal access token; None uses `login`.
        login: user and password.

    Raises:
        CvatError: the server is unavailable, the task does not exist, or the account may not access it.
        ConfigError: the URL begins with http://, and a proxy could read token or password.
    """

    def __init__(self, url: str, task_id: int, *, token: str | None, login: tuple[str, str] | None) -> None:
        self.name = f"{url.rstrip('/')} task {task_id}"
        # As the SDK completes it.
        self._host = url if "://" in url else f"https://{url}"
        refuse_plaintext(self._host, "--cvat", "the token or password")
        self._task_id = task_id
        with self._errors("check the URL, the task ID and the token"):
            self._client = _connect(self._host, token, login)
            self._task = self._client.tasks.retrieve(task_id)
            self._meta = self._task.get_meta()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def annotations(self) -> Json:
        """Returns the annotations as the server's JSON, which has fields that the SDK's types omit."""
        with self._errors("annotations cannot be read"):
            _, response = self._task.api.retrieve_annotations(self._task_id, _parse_response=False)
            annotations: Json = json.loads(self._read(response, "annotations"))
        return annotations

    def labels(self) -> list[Json]:
        """Returns the labels of the task with name, id, type and attributes."""
        with self._errors("labels cannot be read"):
            return [label.to_dict() for label in self._task.get_labels()]

    def deleted_frames(self) -> frozenset[int]:
        """Returns the numbers of the deleted frames."""
        return frozenset(self._meta.deleted_frames or ())

    def frame_sizes(self) -> list[tuple[int, int]]:
        """Returns (width, height) of each frame; a video has a single entry."""
        return [(frame.width, frame.height) for frame in self._meta.frames]

    def frame(self, number: int) -> bytes:
        """Returns an encoded frame in its original quality."""
        with self._errors(f"frame {number} cannot be read"):
            _, response = self._task.api.retrieve_data(
                self._task_id, number=number, quality="original", type="frame", _parse_response=False
            )
            return self._read(response, f"frame {number}")

    def create(self, shapes: Sequence[Json]) -> None:
        """Adds shapes in one call, which is atomic on the server."""
        requests = [models.LabeledShapeRequest(**{**shape, "attributes": _attributes(shape)}) for shape in shapes]
        with self._errors(f"{len(shapes)} masks were not added; run the same command again"):
            self._task.api.partial_update_annotations(
                "create", self._task_id, patched_labeled_data_request=models.PatchedLabeledDataRequest(shapes=requests)
            )

    def _read(self, response: Any, name: str) -> bytes:
        """Returns the body of a response, decompressed piece by piece. Raises CvatError: MAX_RESPONSE_BYTES."""
        content = bytearray()
        for piece in response.stream(_PIECE_BYTES, decode_content=True):
            content += piece
            if len(content) > MAX_RESPONSE_BYTES:
                response.close()
                raise CvatError(f"{self.name}: {name}: more than {MAX_RESPONSE_BYTES} bytes")
        return bytes(content)

    @contextmanager
    def _errors(self, text: str) -> Iterator[None]:
        """Converts the errors of the SDK in the block to CvatError."""
        try:
            yield
        except _SDK_ERRORS as error:
            raise CvatError(f"{self.name}: {text}: {_detail(error)}{url_hint(self._host)}") from error


def _connect(url: str, token: str | None, login: tuple[str, str] | None) -> Client:
    """Returns a client that is logged in. The SDK itself ignores the proxies of the environment."""
    client = Client(url, check_server_version=False)
    proxy = proxy_of_url(url)
    if proxy is not None:
        configuration = client.api_client.configuration
        configuration.proxy = proxy.url
        user = urlsplit(proxy.url).netloc.rpartition("@")[0]
        if user:  # urllib3 takes it from here only
            # urllib3's own function takes Latin-1 only.
            encoded = b64encode(unquote_to_bytes(user)).decode("ascii")
            configuration.proxy_headers = {"proxy-authorization": f"Basic {encoded}"}
        # It reads the configuration when it is made.
        client.api_client.rest_client = RESTClientObject(configuration)
    try:
        client.check_server_version()
        credentials = login if token is None else AccessTokenCredentials(token)
        if credentials is not None:
            client.login(credentials)
    except BaseException:
        # The SDK leaves its connections open.
        client.api_client.rest_client.pool_manager.clear()
        client.close()
        raise
    return client


def _attributes(shape: Json) -> list[Any]:
    return [models.AttributeValRequest(**value) for value in shape["attributes"]]


def _detail(error: Exception) -> str:
    body = getattr(error, "body", None)
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or error)
    return f"{getattr(error, 'status', '')} {text[:300]}".strip()
