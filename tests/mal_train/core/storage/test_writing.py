"""Rules for outputs that need no store; test_s3 has those with one."""

from pathlib import Path

import pytest

from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.storage.addresses import Location
from mal_train.core.storage.writing import check_writable, refuse_same_location


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("s3://b/k", "s3://b/k"),
        ("s3://b/k", "S3://b/k"),
        ("s3://b/d.parquet/", "s3://b/d.parquet"),
        ("az://c/k", "abfs://c/k"),
    ],
)
def test_an_output_that_is_the_input_is_refused(source: Location, output: Location) -> None:
    with pytest.raises(ConfigError):
        refuse_same_location(source, output)


@pytest.mark.parametrize(
    ("source", "output"), [("s3://b/k", "s3://b/l"), ("s3://b/k", Path("k")), ("s3://b/k?1", "s3://b/k?2")]
)
def test_another_output_is_accepted(source: Location, output: Location) -> None:
    refuse_same_location(source, output)


@pytest.mark.parametrize("output", ["s3://b", "s3://b/", "gs://b/out/", "az://c/out.parquet/"])
def test_an_output_that_names_no_file_is_refused_without_a_request(output: str) -> None:
    with pytest.raises(OutputError) as caught:
        check_writable(output)
    assert str(caught.value).startswith(f"{output}: names no file")
