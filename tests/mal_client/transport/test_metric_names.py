"""The names of COCO's figures in Python and on the wire are the same on both sides of it."""

from mal.v1 import evaluation_pb2
from mal_client.transport.serialization import evaluation_messages

from mal_server.api.serialization.evaluation_messages import _write_coco_figures
from mal_train.core.metrics.coco_ap import AP_NAMES


def test_each_figure_that_a_server_writes_is_read_under_its_own_name() -> None:
    written: dict[str, float | None] = {name: at / 100 for at, name in enumerate(AP_NAMES, start=1)}
    wire = _write_coco_figures(written)
    assert [field.name for field, _ in wire.ListFields()] == [
        f.name for f in evaluation_pb2.CocoFigures.DESCRIPTOR.fields
    ]
    assert evaluation_messages.coco_figures(wire) == written


def test_a_figure_that_is_undefined_stays_so() -> None:
    assert evaluation_messages.coco_figures(_write_coco_figures(dict.fromkeys(AP_NAMES))) == dict.fromkeys(AP_NAMES)
