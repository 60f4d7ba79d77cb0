"""The part of CVAT's HTTP API that the SDK uses for one task; responses have the shape of version 2.80."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.mal_client.integrations.cvat.cvat_task import LABELS, Json, TaskInMemory

TOKEN = "personal-token"
USER: Json = {"url": "http://cvat/api/users/1", "id": 1, "username": "ann", "first_name": "", "last_name": ""}


@dataclass
class CvatHttp:
    """HTTP server of one task in memory.

    Attributes:
        task: the task.
        fail_patches: number of PATCH requests to fail with status 500.
        requests: methods and paths of the requests.
    """

    task: TaskInMemory
    fail_patches: int = 0
    requests: list[str] = field(default_factory=list)

    def app(self) -> web.Application:
        """Builds the application."""
        app = web.Application()
        app.router.add_get("/api/server/about", self._about)
        app.router.add_get("/api/users/self", self._guarded(lambda: USER))
        app.router.add_get("/api/tasks/7", self._guarded(_task))
        app.router.add_get("/api/tasks/7/data/meta", self._guarded(lambda: _meta(self.task)))
        app.router.add_get("/api/tasks/7/data/", self._frame)
        app.router.add_get("/api/labels", self._guarded(lambda: _page([{**row, "task_id": 7} for row in LABELS])))
        app.router.add_get("/api/tasks/7/annotations/", self._guarded(self.task.annotations))
        app.router.add_patch("/api/tasks/7/annotations/", self._patch)
        return app

    async def _about(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(_ABOUT)

    def _is_authorized(self, request: web.Request) -> bool:
        self.requests.append(f"{request.method} {request.path}")
        return request.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _guarded(self, content: Callable[[], Any]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def endpoint(request: web.Request) -> web.StreamResponse:
            if not self._is_authorized(request):
                return web.json_response({"detail": "Authentication credentials were not provided."}, status=401)
            return web.json_response(content())

        return endpoint

    async def _frame(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        assert (query["type"], query["quality"]) == ("frame", "original")
        return web.Response(body=self.task.frame(int(query["number"])), content_type="image/png")

    async def _patch(self, request: web.Request) -> web.StreamResponse:
        assert request.query["action"] == "create"
        body = await request.json()
        if self.fail_patches:
            self.fail_patches -= 1
            return web.json_response({"detail": "database unavailable"}, status=500)
        for shape in body["shapes"]:
            # The rules of the server.
            assert shape["type"] == "mask"
            assert "id" not in shape
            *runs, left, top, right, bottom = shape["points"]
            assert sum(runs) == (right - left + 1) * (bottom - top + 1)
        self.task.create(body["shapes"])
        created = self.task.annotations()["shapes"][-len(body["shapes"]) :]
        return web.json_response({"version": 0, "shapes": created, "tracks": [], "tags": []})


_ABOUT = {
    "name": "Computer Vision Annotation Tool",
    "description": "",
    "version": "2.80.0",
    "logo_url": "",
    "subtitle": "",
}


def _page(rows: list[Json]) -> Json:
    return {"count": len(rows), "next": None, "previous": None, "results": rows}


def _task() -> Json:
    return {
        "url": "http://cvat/api/tasks/7",
        "id": 7,
        "name": "cups",
        "project_id": None,
        "mode": "annotation",
        "owner": USER,
        "assignee": None,
        "bug_tracker": "",
        "created_date": "2026-01-01T00:00:00Z",
        "updated_date": "2026-01-01T00:00:00Z",
        "overlap": 0,
        "segment_size": 6,
        "status": "annotation",
        "data_chunk_size": 72,
        "data_compressed_chunk_type": "imageset",
        "guide_id": None,
        "data_original_chunk_type": "imageset",
        "size": 6,
        "image_quality": 70,
        "data": 7,
        "dimension": "2d",
        "subset": "",
        "organization": None,
        "target_storage": None,
        "source_storage": None,
        "jobs": {"url": "http://cvat/api/jobs?task_id=7", "count": 1, "completed": 0, "validation": 0},
        "labels": {"url": "http://cvat/api/labels?task_id=7"},
        "assignee_updated_date": None,
        "validation_mode": None,
        "consensus_enabled": False,
        "media_type": "image",
    }


def _meta(task: TaskInMemory) -> Json:
    frames = [
        {"width": width, "height": height, "name": f"{number}.png", "related_files": 0}
        for number, (width, height) in enumerate(task.frame_sizes())
    ]
    return {
        "chunks_updated_date": "2026-01-01T00:00:00Z",
        "chunk_size": 72,
        "size": 6,
        "image_quality": 70,
        "start_frame": 0,
        "stop_frame": 5,
        "frame_filter": "",
        "frames": frames,
        "deleted_frames": sorted(task.deleted),
        "included_frames": None,
        "cloud_storage_id": None,
        "storage_method": "cache",
        "storage": "local",
        "sorting_method": "lexicographical",
    }
