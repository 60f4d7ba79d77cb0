"""Client and server use the same names for COCO's metrics, in Python and on the wire."""

from mal.v1 import evaluation_pb2
from mal_client.transport.serialization import evaluation_messages

from mal_server.api.serialization.evaluation_messages import write_coco_metrics
from mal_train.core.metrics.average_precision import AP_NAMES


def test_a_client_reads_each_metric_under_the_name_that_the_server_wrote() -> None:
    written: dict[str, float | None] = {name: number / 100 for number, name in enumerate(AP_NAMES, start=1)}
    wire = write_coco_metrics(written)
    assert [field.name for field, _ in wire.ListFields()] == [
        f.name for f in evaluation_pb2.CocoFigures.DESCRIPTOR.fields
    ]
    assert evaluation_messages.coco_metrics(wire) == written


def test_an_undefined_metric_stays_undefined() -> None:
    assert evaluation_messages.coco_metrics(write_coco_metrics(dict.fromkeys(AP_NAMES))) == dict.fromkeys(AP_NAMES)
