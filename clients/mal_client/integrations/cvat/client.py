"""Accesses a task on a CVAT server through the CVAT SDK. Needs the extra `cvat`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cvat_sdk import make_client, models
from cvat_sdk.core.exceptions import CvatSdkException
from cvat_sdk.exceptions import ApiException
from urllib3.exceptions import HTTPError

from mal_client.errors import ClientError
from mal_client.integrations.cvat.task_plan import Json


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
    """

    def __init__(self, url: str, task_id: int, *, token: str | None, login: tuple[str, str] | None) -> None:
        self.name = f"{url.rstrip('/')} task {task_id}"
        self._task_id = task_id
        try:
            self._client = make_client(url, access_token=token, credentials=login)
            self._task = self._client.tasks.retrieve(task_id)
            self._meta = self._task.get_meta()
        except (ApiException, CvatSdkException, HTTPError) as error:
            raise CvatError(f"{self.name}: {_detail(error)}; check the URL, the task ID and the token") from error

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def annotations(self) -> Json:
        """Returns the annotations as the server's JSON, which has fields that the SDK's types omit."""
        try:
            _, response = self._task.api.retrieve_annotations(self._task_id, _parse_response=False)
        except (ApiException, HTTPError) as error:
            raise CvatError(f"{self.name}: annotations cannot be read: {_detail(error)}") from error
        annotations: Json = json.loads(response.data)
        return annotations

    def labels(self) -> list[Json]:
        """Returns the labels of the task with name, id, type and attributes."""
        return [label.to_dict() for label in self._task.get_labels()]

    def deleted_frames(self) -> frozenset[int]:
        """Returns the numbers of the deleted frames."""
        return frozenset(self._meta.deleted_frames or ())

    def frame_sizes(self) -> list[tuple[int, int]]:
        """Returns (width, height) of each frame; a video has a single entry."""
        return [(frame.width, frame.height) for frame in self._meta.frames]

    def frame(self, number: int) -> bytes:
        """Returns an encoded frame in its original quality."""
        try:
            return bytes(self._task.get_frame(number, quality="original").read())
        except (ApiException, HTTPError) as error:
            raise CvatError(f"{self.name}: frame {number} cannot be read: {_detail(error)}") from error

    def create(self, shapes: Sequence[Json]) -> None:
        """Adds shapes in one call, which is atomic on the server."""
        requests = [models.LabeledShapeRequest(**{**shape, "attributes": _attributes(shape)}) for shape in shapes]
        try:
            self._task.api.partial_update_annotations(
                "create", self._task_id, patched_labeled_data_request=models.PatchedLabeledDataRequest(shapes=requests)
            )
        except (ApiException, HTTPError) as error:
            raise CvatError(
                f"{self.name}: {len(shapes)} masks were not added: {_detail(error)}; run the same command again"
            ) from error


def _attributes(shape: Json) -> list[Any]:
    return [models.AttributeValRequest(**value) for value in shape["attributes"]]


def _detail(error: Exception) -> str:
    body = getattr(error, "body", None)
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or error)
    return f"{getattr(error, 'status', '')} {text[:300]}".strip()
