"""Claims about labeling one image, blocking and asyncio."""

import asyncio
import io
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
from mal_client.client import AsyncClient, Client
from mal_client.errors import CallCancelled, CallTimedOut, InvalidRequest, ServerError, ServerUnavailable
from mal_client.transport.image_call import MAX_TRUNCATED, Prompts
from mal_client.types import BoxLabel, LabelOptions
from numpy.typing import ArrayLike
from PIL import Image

from mal_train.core.errors import BadImage, ConfigError
from mal_train.core.images.decoder import decode_image
from mal_train.core.settings import Branch
from tests.mal_client.cutting import Cut, cutting
from tests.mal_client.fake_server import BREAK_TEXT, SHA, FakeServer, Faults, Limits, serving
from tests.mal_train.core.images.tiffs import tiff_of

BOXES = [[1.0, 2.0, 10.0, 8.0], [5.0, 5.0, 4.0, 4.0], [0.0, 0.0, 20.0, 20.0]]
PIXELS = np.random.default_rng(3).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def client(fake: FakeServer) -> Iterator[Client]:
    with serving(fake) as address, Client(address, timeout_s=20) as opened:
        yield opened


def label_both_ways(fake: FakeServer, boxes: list[list[float]], image: object = PIXELS) -> list[list[BoxLabel]]:
    """Returns the labels of the blocking and of the asyncio client."""

    async def send(address: str) -> list[BoxLabel]:
        async with AsyncClient(address, timeout_s=20) as client:
            return await client.label_image(image, boxes)  # type: ignore[arg-type]

    with serving(fake) as address:
        with Client(address, timeout_s=20) as client:
            blocking = client.label_image(image, boxes)  # type: ignore[arg-type]
        return [blocking, asyncio.run(send(address))]


def test_labels_are_in_the_order_of_the_boxes_whatever_the_order_of_batches() -> None:
    for labels in label_both_ways(FakeServer(Faults(reverse=True, batch=1)), BOXES):
        assert [label.index for label in labels] == [0, 1, 2]
        assert [label.area for label in labels] == [80, 16, 400]
        assert [label.box for label in labels] == [tuple(box) for box in BOXES]


def test_a_label_has_mask_score_and_provenance(client: Client) -> None:
    label = client.label_image(PIXELS, BOXES[:1])[0]
    expected = np.zeros((30, 40), dtype=bool)
    expected[2:10, 1:11] = True
    np.testing.assert_array_equal(label.mask, expected)
    assert (label.score, label.agreement, label.mask_box) == (0.75, 0.5, (1.0, 2.0, 10.0, 8.0))
    assert label.ok
    assert label.flags == ("FULL_BOX",)
    assert label.model is not None
    assert label.model.checkpoint_sha256 == SHA
    assert label.timing is not None
    assert label.timing.batch_size == 1


def test_all_forms_of_a_mask_are_equal(client: Client) -> None:
    label = client.label_image(PIXELS, BOXES[:1])[0]
    (ring,) = label.polygons
    assert {tuple(point) for point in ring.points.tolist()} == {(1, 2), (11, 2), (11, 10), (1, 10)}
    with Image.open(io.BytesIO(label.png)) as image:
        np.testing.assert_array_equal(np.asarray(image), label.mask)
    crop = label.png_crop
    assert (crop.x, crop.y, crop.crop_width, crop.crop_height) == (1, 2, 10, 8)


@pytest.mark.parametrize("form", ["mask", "polygons", "png", "png_crop"])
def test_every_form_of_a_missing_mask_raises_with_its_error(form: str) -> None:
    (label,) = label_both_ways(FakeServer(), [[1.0, 2.0, -10.0, 8.0]])[0]
    with pytest.raises(ValueError, match=r"^box 0 .*BAD_BOX.*\.error"):
        getattr(label, form)


def test_options_reach_the_server_and_defaults_stay_unset(fake: FakeServer, client: Client) -> None:
    client.label_image(PIXELS, BOXES, LabelOptions(Branch.MIXED, 0.4, True, True, 9, resolve_overlaps=True))
    client.label_image(PIXELS, BOXES)
    given, default = (request.options for request in fake.label_requests)
    assert (given.threshold, given.compute_agreement, given.flip_test) == (0.4, True, True)
    assert given.min_component_area_px == 9
    assert (given.resolve_overlaps, default.resolve_overlaps) == (True, False)
    assert not default.HasField("threshold")
    assert not default.HasField("min_component_area_px")
    assert default.branch == 0


def test_array_pillow_image_path_and_bytes_arrive_as_the_same_pixels(
    fake: FakeServer, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    for image in (PIXELS, Image.fromarray(PIXELS), path, str(path), path.read_bytes()):
        client.label_image(image, BOXES)
    for request in fake.label_requests:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(request.image.content))), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "PA"])
def test_pillow_images_of_8_bits_arrive_with_their_colors(fake: FakeServer, client: Client, mode: str) -> None:
    image = _pillow_image(mode)
    client.label_image(image, BOXES)
    sent = decode_image(fake.label_requests[0].image.content)
    np.testing.assert_array_equal(sent, np.asarray(image.convert("RGB")))


def _pillow_image(mode: str) -> Image.Image:
    rgb = Image.fromarray(PIXELS)
    if mode == "PA":
        return rgb.convert("P").convert("PA")
    if mode == "LAB":
        return Image.merge("LAB", rgb.split())
    return rgb.convert(mode)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_pillow_images_of_more_bits_arrive_stretched(fake: FakeServer, client: Client, mode: str) -> None:
    levels = PIXELS[:, :, 0].copy()
    levels[0, :2] = 0, 255  # the complete range
    values = levels.astype(np.uint16) * 3 + 30_000
    image = Image.fromarray(values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "i4", "F": "f4"}[mode]))
    assert image.mode == mode
    client.label_image(image, BOXES)
    client.label_image(values, BOXES)
    for request in fake.label_requests:
        np.testing.assert_array_equal(decode_image(request.image.content)[:, :, 0], levels)


def test_the_file_of_an_unread_pillow_image_is_sent_where_pillow_would_cut_its_values(
    fake: FakeServer, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "wide.tif"
    path.write_bytes(tiff_of(PIXELS.astype(np.uint16) * 3 + 40_000))
    with Image.open(path) as unread, Image.open(path) as read:
        assert unread.mode == "RGB"
        client.label_image(unread, BOXES)
        assert fake.label_requests[0].image.content == path.read_bytes()
        read.load()
        client.label_image(read, BOXES)
        np.testing.assert_array_equal(decode_image(fake.label_requests[1].image.content), np.asarray(read))
        assert unread.load() is not None  # the file is where Pillow left it


def test_a_file_is_sent_unchanged(fake: FakeServer, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(PIXELS).save(path, quality=60)
    client.label_image(path, BOXES)
    assert fake.label_requests[0].image.content == path.read_bytes()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.complex64),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 5), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((3, 40, 40), np.uint8),
        np.full((4, 4), np.nan),
        Image.new("L", (0, 5)),
        Image.new("F", (5, 0)),
        17,
        "nowhere.png",
        b"",
        b"text",
    ],
)
def test_an_invalid_image_is_refused_with_a_reason(client: Client, image: object) -> None:
    with pytest.raises((BadImage, InvalidRequest)) as caught:
        client.label_image(image, BOXES)  # type: ignore[arg-type]
    error = caught.value
    assert isinstance(error, BadImage | InvalidRequest)
    assert error.reason in {"IMAGE_FORMAT", "IMAGE_NOT_FOUND", "IMAGE_DECODE_FAILED"}


@pytest.mark.parametrize(
    "boxes",
    [
        [1, 2, 3, 4],
        [[1, 2, 3]],
        "box",
        [[1, 2, 3, 4], [1, 2]],
        [["a", 1, 2, 3]],
        ["1234"],
        [[]],
        7,
        [[10**400, 1, 2, 3]],
        [{1, 2, 3, 4}],
        {(1, 2, 3, 4)},
        [{1: 0, 2: 0, 3: 0, 4: 0}],
    ],
)
def test_boxes_of_another_shape_are_refused_before_sending(fake: FakeServer, client: Client, boxes: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.label_image(PIXELS, boxes)  # type: ignore[arg-type]
    assert caught.value.reason == "BAD_BOXES"
    assert not fake.label_requests


@pytest.mark.parametrize("form", [np.array, np.float32, tuple, list])
def test_boxes_may_be_arrays_and_sequences(form: Callable[[object], ArrayLike]) -> None:
    assert Prompts.of(form([[1, 2, 3, 4.5], [5, 6, 7, 8]])).boxes == [(1.0, 2.0, 3.0, 4.5), (5.0, 6.0, 7.0, 8.0)]


def test_no_boxes_give_no_labels(client: Client) -> None:
    assert client.label_image(PIXELS, []) == []
    assert client.label_image(PIXELS, np.zeros((0, 4))) == []


def test_a_bad_box_fails_alone(client: Client) -> None:
    labels = client.label_image(PIXELS, [BOXES[0], [float("nan"), 0.0, 1.0, 1.0], [100.0, 100.0, 5.0, 5.0], BOXES[1]])
    assert [label.ok for label in labels] == [True, False, False, True]
    error = labels[1].error
    assert error is not None
    assert error.reason == "BAD_BOX"
    with pytest.raises(ValueError, match="box 1"):
        _ = labels[1].mask


def test_an_image_above_the_limit_of_the_server_is_refused_before_sending() -> None:
    fake = FakeServer(limits=Limits(max_image_bytes=100))
    with (
        serving(fake) as address,
        Client(address) as client,
        pytest.raises(BadImage, match="100"),
    ):
        client.label_image(PIXELS, BOXES)
    assert not fake.label_requests


def test_more_boxes_than_the_limit_are_sent_in_several_calls() -> None:
    for labels in label_both_ways(FakeServer(limits=Limits(max_boxes=2)), BOXES):
        assert [label.area for label in labels] == [80, 16, 400]


def test_a_call_above_256_kib_is_retried_while_the_server_is_unavailable() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    for unavailable in (1, 2):
        fake = FakeServer(Faults(unavailable=unavailable))
        with serving(fake) as address, Client(address, timeout_s=20) as client:
            labels = client.label_image(noise, BOXES)
        assert len(fake.label_requests[0].image.content) > 256 * 1024
        assert all(label.ok for label in labels)
        assert fake.calls.count("LabelImage") == unavailable + 1


def test_retry_pushback_is_followed_beyond_the_attempts_of_grpc() -> None:
    fake = FakeServer(Faults(unavailable=12, pushback_ms=20))
    for labels in label_both_ways(fake, BOXES):
        assert all(label.ok for label in labels)
    assert fake.calls.count("LabelImage") == 12 + 2


def test_after_a_broken_stream_only_pending_boxes_are_sent_again() -> None:
    fake = FakeServer(Faults(batch=1, break_after=1, breaks=2))
    with serving(fake) as address, Client(address, timeout_s=20) as client:
        assert [label.area for label in client.label_image(PIXELS, BOXES)] == [80, 16, 400]
    assert [len(request.instances) for request in fake.label_requests] == [3, 2, 1]


def test_the_asyncio_client_recovers_from_a_broken_stream() -> None:
    async def send(address: str) -> list[BoxLabel]:
        async with AsyncClient(address, timeout_s=20) as client:
            return await client.label_image(PIXELS, BOXES)

    with serving(FakeServer(Faults(batch=1, break_after=1, breaks=2))) as address:
        assert [label.area for label in asyncio.run(send(address))] == [80, 16, 400]


@pytest.mark.parametrize("cut", Cut)
def test_a_call_that_a_proxy_truncates_is_sent_again(cut: Cut) -> None:
    """The status is INTERNAL or UNKNOWN, which gRPC itself does not retry."""

    async def send(address: str) -> list[BoxLabel]:
        async with AsyncClient(address, timeout_s=60) as client:
            return await client.label_image(PIXELS, BOXES)

    blocking, loop = FakeServer(Faults(batch=1)), FakeServer(Faults(batch=1))
    with serving(blocking) as server, cutting(server, cut, 2, after=1) as address, Client(address) as client:
        assert [label.area for label in client.label_image(PIXELS, BOXES)] == [80, 16, 400]
    with serving(loop) as server, cutting(server, cut, 2, after=1) as address:
        assert [label.area for label in asyncio.run(send(address))] == [80, 16, 400]
    for fake in (blocking, loop):
        sent = [len(request.instances) for request in fake.label_requests]
        if cut is Cut.RESET_FIRST:
            assert sent == [3, 3, 3]
        else:  # a result that the reset overtook inside gRPC is requested again, one that arrived is not
            assert len(sent) == 3
            assert sent == sorted(sent, reverse=True)
            assert sent[0] == 3


def test_a_call_is_given_up_after_three_truncated_streams_in_a_row() -> None:
    def send(address: str) -> None:
        with Client(address) as client:
            client.label_image(PIXELS, BOXES)

    async def send_asyncio(address: str) -> None:
        async with AsyncClient(address) as client:
            await client.label_image(PIXELS, BOXES)

    for run in (send, lambda address: asyncio.run(send_asyncio(address))):
        fake = FakeServer()
        with (
            serving(fake) as server,
            cutting(server, Cut.RESET_FIRST, 99, after=1) as address,
            pytest.raises(ServerError, match=r"127\.0\.0\.1:\d+: 3 .*3 boxes"),
        ):
            run(address)
        assert len(fake.label_requests) == MAX_TRUNCATED


@pytest.mark.parametrize("cut", Cut)
def test_server_info_recovers_from_truncated_streams_and_gives_up_in_the_end(cut: Cut) -> None:
    async def send(address: str) -> str:
        async with AsyncClient(address) as client:
            return (await client.server_info()).arch

    with serving(FakeServer()) as server:
        with cutting(server, cut, 2) as address, Client(address) as client:
            assert client.server_info().arch == "box-filler"
        with cutting(server, cut, 2) as address:
            assert asyncio.run(send(address)) == "box-filler"
        with (
            cutting(server, cut, 99) as address,
            Client(address) as client,
            pytest.raises((ServerError, CallCancelled), match=r"RST_STREAM|removed"),
        ):
            client.server_info()


def test_a_call_that_fails_with_internal_is_not_sent_again() -> None:
    fake = FakeServer(Faults(batch=1, break_after=1, breaks=1, break_code=grpc.StatusCode.INTERNAL))
    with (
        serving(fake) as address,
        Client(address, timeout_s=20) as client,
        pytest.raises(ServerError, match=BREAK_TEXT),
    ):
        client.label_image(PIXELS, BOXES)
    assert fake.calls.count("LabelImage") == 1


@pytest.mark.parametrize("break_after", [0, 1])
def test_a_call_that_a_closing_server_cancels_is_sent_again(break_after: int) -> None:
    """gRPC ends in this way the calls of a closing server that no handler has seen."""

    def closing() -> FakeServer:
        return FakeServer(Faults(batch=1, break_after=break_after, breaks=1, break_code=grpc.StatusCode.CANCELLED))

    async def send(address: str) -> list[BoxLabel]:
        async with AsyncClient(address, timeout_s=20) as client:
            return await client.label_image(PIXELS, BOXES)

    blocking, loop = closing(), closing()
    with serving(blocking) as address, Client(address, timeout_s=20) as client:
        assert [label.area for label in client.label_image(PIXELS, BOXES)] == [80, 16, 400]
    with serving(loop) as address:
        assert [label.area for label in asyncio.run(send(address))] == [80, 16, 400]
    for fake in (blocking, loop):
        assert [len(request.instances) for request in fake.label_requests] == [3, 3 - break_after]


def test_a_cancelled_call_is_given_up_when_the_next_pause_would_pass_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mal_client.transport.image_call.RETRY_PAUSES_S", (0.0, 0.0, 1000.0, 0.0))
    fake = FakeServer(Faults(break_after=0, breaks=10**6, break_code=grpc.StatusCode.CANCELLED))
    with (
        serving(fake) as address,
        Client(address, timeout_s=500) as client,
        pytest.raises(CallCancelled, match=BREAK_TEXT),
    ):
        client.label_image(PIXELS, BOXES)
    assert fake.calls.count("LabelImage") == 3


def test_a_call_that_the_caller_cancels_is_not_sent_again() -> None:
    async def send(address: str, fake: FakeServer) -> None:
        async with AsyncClient(address, timeout_s=20) as client:
            task = asyncio.create_task(client.label_image(PIXELS, BOXES))
            while not fake.label_requests:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    fake = FakeServer(Faults(hold_after=0))
    with serving(fake) as address:
        asyncio.run(send(address, fake))
    assert len(fake.label_requests) == 1


def test_a_box_with_retry_info_is_sent_again_alone() -> None:
    fake = FakeServer(Faults(retry_boxes={1: 2}))
    with serving(fake) as address, Client(address, timeout_s=20) as client:
        labels = client.label_image(PIXELS, BOXES)
    assert all(label.ok for label in labels)
    assert [[instance.instance_id for instance in request.instances] for request in fake.label_requests] == [
        [0, 1, 2],
        [1],
        [1],
    ]


def test_a_box_that_never_succeeds_gets_its_last_error() -> None:
    with serving(FakeServer(Faults(retry_boxes={1: 99}))) as address, Client(address, timeout_s=20) as client:
        labels = client.label_image(PIXELS, BOXES)
    assert [label.ok for label in labels] == [True, False, True]
    assert labels[1].error is not None
    assert labels[1].error.reason == "QUEUE_FULL"


def test_a_response_without_a_box_is_an_error() -> None:
    with (
        serving(FakeServer(Faults(leave_out={1}))) as address,
        Client(address, timeout_s=20) as client,
        pytest.raises(ServerError, match=r" 1 boxes?"),
    ):
        client.label_image(PIXELS, BOXES)


def test_labels_are_streamed_as_their_batches_finish() -> None:
    with serving(FakeServer(Faults(batch=1))) as address, Client(address, timeout_s=20) as client:
        stream = client.stream_image(PIXELS, BOXES)
        assert next(stream).index == 0
        stream.close()  # type: ignore[attr-defined]
        assert len(client.label_image(PIXELS, BOXES)) == 3


def test_many_threads_share_one_client(client: Client) -> None:
    areas: list[int] = []
    threads = [
        threading.Thread(target=lambda: areas.extend(label.area for label in client.label_image(PIXELS, BOXES)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(areas) == sorted([80, 16, 400] * 8)


def test_an_address_where_no_server_listens_fails_before_the_deadline() -> None:
    """A call that waits for its deadline would raise `CallTimedOut`."""
    address = f"127.0.0.1:{_free_port()}"

    async def send() -> None:
        async with AsyncClient(address) as client:
            await client.label_image(PIXELS, BOXES)

    with Client(address) as client, pytest.raises(ServerUnavailable, match=address):
        client.label_image(PIXELS, BOXES)
    with pytest.raises(ServerUnavailable, match=address):
        asyncio.run(send())


def test_a_silent_server_times_out_at_the_deadline_with_its_address() -> None:
    with socket.socket() as listener:
        # Accepts the connection and sends nothing, as a hung process does.
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with Client(address, timeout_s=1.0) as client, pytest.raises(CallTimedOut, match=rf"{address}.* 1 s"):
            client.server_info()


def test_a_slow_server_times_out_at_the_deadline_of_the_call() -> None:
    with serving(FakeServer(Faults(hold_after=0))) as address, Client(address) as client:
        client.server_info()
        with pytest.raises(CallTimedOut, match=r" 0\.2 s"):
            client.label_image(PIXELS, BOXES, timeout_s=0.2)


def test_another_grpc_server_is_refused() -> None:
    other = grpc.server(futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(InvalidRequest, match="mal-server"):
        client.server_info()
    other.stop(None).wait()


def test_a_closed_client_refuses_calls(client: Client) -> None:
    assert not client.is_closed
    client.close()
    client.close()
    assert client.is_closed
    with pytest.raises(CallCancelled, match=client.address):
        client.label_image(PIXELS, BOXES)


def test_a_closed_asyncio_client_refuses_calls() -> None:
    async def send(address: str) -> None:
        async with AsyncClient(address, timeout_s=20) as client:
            assert not client.is_closed
        assert client.is_closed
        with pytest.raises(CallCancelled, match=address):
            await client.label_image(PIXELS, BOXES)

    with serving(FakeServer()) as address:
        asyncio.run(send(address))


def test_both_clients_have_the_same_public_methods() -> None:
    def public(client: type) -> set[str]:
        return {name for name in dir(client) if not name.startswith("_")}

    # Jobs run in a thread, on a blocking client.
    assert public(Client) - public(AsyncClient) == {"open_channel", "pause", "servers"}
    assert public(AsyncClient) <= public(Client)


def test_the_representation_of_a_client_has_its_address_and_no_token() -> None:
    with Client("localhost:50051", token="secret") as client:
        assert repr(client) == "<Client localhost:50051>"
    assert repr(client) == "<Client localhost:50051 (closed)>"
    assert repr(AsyncClient("localhost:50051", token="secret")) == "<AsyncClient localhost:50051>"


def test_close_ends_the_wait_for_a_retry_in_another_thread() -> None:
    with serving(FakeServer(Faults(unavailable=10**6, pushback_ms=60_000))) as address:
        client = Client(address)
        client.server_info()
        threading.Timer(0.3, client.close).start()
        with pytest.raises((CallCancelled, ServerUnavailable)):
            client.label_image(PIXELS, BOXES)


@pytest.mark.parametrize("address", ["localhost", "", ":50051", "localhost:", "localhost:http"])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Client(address)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, float("nan")])
def test_a_threshold_outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        LabelOptions(threshold=threshold)


def test_server_info_has_model_and_limits(client: Client) -> None:
    info = client.server_info()
    assert (info.arch, info.crop_size, info.mask_thresholds) == ("box-filler", 64, (0.1, 0.2, 0.3))
    assert info.categories == {1: "cup"}
    assert info.limits.max_items_in_flight == 4


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
