"""Hypothesis strategies for requests with any content that the messages can hold."""

from hypothesis import strategies as st
from mal.v1 import labeling_pb2

from tests.mal_server.fakes import (
    DISC_PNG,
    label_request,
)

FLOATS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-300, 0.5, 1.0, 59.5, 60.0, 1e9, -1e9, 1e300]),
)


def with_points(
    request: labeling_pb2.LabelImageRequest, points: list[tuple[float, float, int]]
) -> labeling_pb2.LabelImageRequest:
    for x, y, point_label in points:
        request.instances[0].points.add(x=x, y=y, label=point_label)
    return request


_OF_BOXES = st.builds(
    label_request,
    st.tuples(FLOATS, FLOATS, FLOATS, FLOATS),
    st.tuples(FLOATS, FLOATS, FLOATS, FLOATS),
    content=st.one_of(st.just(DISC_PNG), st.binary(max_size=40)),
    ids=st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 3)),
    threshold=st.one_of(st.none(), FLOATS),
    branch=st.integers(-5, 8),
    flip_test=st.booleans(),
    formats=st.lists(st.integers(-1, 6), max_size=4),
    polygon_tolerance_px=st.one_of(st.none(), FLOATS),
    min_component_area_px=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
)
REQUESTS = st.builds(
    with_points, _OF_BOXES, st.lists(st.tuples(FLOATS, FLOATS, st.sampled_from([1, 1, 2, 2, 0, 3, -1])), max_size=3)
)
