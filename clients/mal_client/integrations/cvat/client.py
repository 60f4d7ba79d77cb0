"""A task on a CVAT server, through the CVAT SDK. Needs the extra `cvat`."""

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


class CvatFailed(ClientError):
    """A call to the CVAT server did not end well."""


class SdkSite:
    """One task of a server. A context manager that ends the connection.

    Args:
        url: of the server, for example https://app.cvat.ai.
        task_id: number of the task, as in its address.
        token: a personal access token.
        login: user and password, where there is no token.

    Raises:
        CvatFailed: nobody there, no such task, or no right to see it.
    """

    def __init__(self, url: str, task_id: int, *, token: str | None, login: tuple[str, str] | None) -> None:
        self.name = f"{url.rstrip('/')} task {task_id}"
        self._task_id = task_id
        try:
            self._client = make_client(url, access_token=token, credentials=login)
            self._task = self._client.tasks.retrieve(task_id)
            self._meta = self._task.get_meta()
        except (ApiException, CvatSdkException, HTTPError) as error:
            raise CvatFailed(f"{self.name}: {_said(error)}; check the address, the number and the token") from error

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def annotations(self) -> Json:
        """As the server's JSON: what the SDK's types leave out stays in it."""
        try:
            _, response = self._task.api.retrieve_annotations(self._task_id, _parse_response=False)
        except (ApiException, HTTPError) as error:
            raise CvatFailed(f"{self.name}: annotations cannot be read: {_said(error)}") from error
        found: Json = json.loads(response.data)
        return found

    def labels(self) -> list[Json]:
        """With name, id, type and attributes."""
        return [label.to_dict() for label in self._task.get_labels()]

    def deleted_frames(self) -> frozenset[int]:
        """Numbers of frames."""
        return frozenset(self._meta.deleted_frames or ())

    def frame_sizes(self) -> list[tuple[int, int]]:
        """One for all frames of a video."""
        return [(frame.width, frame.height) for frame in self._meta.frames]

    def frame(self, number: int) -> bytes:
        """In its original quality."""
        try:
            return bytes(self._task.get_frame(number, quality="original").read())
        except (ApiException, HTTPError) as error:
            raise CvatFailed(f"{self.name}: frame {number} cannot be read: {_said(error)}") from error

    def create(self, shapes: Sequence[Json]) -> None:
        """Adds shapes in one call, which the server does wholly or not at all."""
        made = [models.LabeledShapeRequest(**{**shape, "attributes": _attributes(shape)}) for shape in shapes]
        try:
            self._task.api.partial_update_annotations(
                "create", self._task_id, patched_labeled_data_request=models.PatchedLabeledDataRequest(shapes=made)
            )
        except (ApiException, HTTPError) as error:
            raise CvatFailed(
                f"{self.name}: {len(shapes)} masks were not taken: {_said(error)}; run the same command again"
            ) from error


def _attributes(shape: Json) -> list[Any]:
    return [models.AttributeValRequest(**value) for value in shape["attributes"]]


def _said(error: Exception) -> str:
    body = getattr(error, "body", None)
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or error)
    return f"{getattr(error, 'status', '')} {text[:300]}".strip()
