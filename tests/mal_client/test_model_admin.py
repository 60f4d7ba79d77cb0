"""Claims about `mal-client models` and requests with a model name, against the server with a fake predictor."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mal.v1 import model_pb2, types_pb2
from mal_client.cli import main
from mal_client.client import Client
from mal_client.dataset.provenance import provenance_of
from mal_client.errors import InvalidRequest
from mal_client.transport.serialization import labeling_messages
from mal_client.types import LabelOptions

from mal_train.core.settings import Branch
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, BrightPredictor, loaded

MODELS = [{"name": name, "checkpoint": f"{name}.malckpt"} for name in ("cats", "dogs")]


@pytest.fixture
def address() -> Iterator[str]:
    with served(checkpoint=None, models=MODELS) as server_address:
        yield server_address


def test_models_are_listed_loaded_and_unloaded(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["models", "list", "--server", address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["cats", "default"], ["dogs", "serving"]]
    assert main.main(["models", "load", "dogs", "--server", address]) == 0
    assert {"dogs:", "abababababab"} <= set(capsys.readouterr().out.split())
    assert main.main(["models", "unload", "dogs", "--server", address]) == 0
    capsys.readouterr()
    assert main.main(["models", "list", "--json", "--server", address]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["branches"]) == ("cats", ["student", "teacher", "mixed"])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["load", "dog"], ["dog", "dogs"]),
        (["load", "dogs", "--from", "trained/a.malckpt"], ["trained"]),
        (["load", "dogs", "--from", "a.malckpt"], ["FOLDER/PATH"]),
        (["unload", "cats"], ["cats"]),
    ],
)
def test_a_refusal_is_one_line_with_the_names(
    address: str, arguments: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["models", *arguments, "--server", address]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in names)
    assert len(error.splitlines()) == 1


@pytest.fixture
def both() -> Iterator[str]:
    """Returns the addresses of two servers, of which the second does not serve `dogs`."""
    with (
        served(checkpoint=None, models=MODELS, listen={"host": "127.0.0.1", "port": 0}) as first,
        served(checkpoint=None, models=MODELS[:1], listen={"host": "127.0.0.2", "port": 0}) as second,
    ):
        yield f"{first},{second}"


def test_models_of_several_servers_are_listed_with_the_server(both: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = both.split(",")
    assert main.main(["models", "list", "--server", both]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[first, "cats"], [first, "dogs"], [second, "cats"]]
    assert main.main(["models", "list", "--json", "--server", both]) == 0
    assert [row["server"] for row in json.loads(capsys.readouterr().out)] == [first, first, second]


def test_models_are_loaded_and_unloaded_on_each_of_several_servers(
    both: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = both.split(",")
    assert main.main(["models", "load", "cats", "--server", both]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [[first, "cats:"], [second, "cats:"]]
    # One of them has no such model: the other must not keep it because of that.
    assert main.main(["models", "unload", "dogs", "--server", both]) == 2
    printed = capsys.readouterr()
    assert printed.out.split()[:2] == [first, "dogs:"]
    assert second in printed.err
    assert main.main(["models", "list", "--server", both]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [[first, "cats"], [second, "cats"]]


def test_the_branches_of_the_named_model_decide() -> None:
    predictor = BrightPredictor()
    with (
        served(
            load=lambda plan: loaded(plan, predictor, has_teacher=plan.name == "cats"), checkpoint=None, models=MODELS
        ) as address,
        Client(address) as client,
    ):
        info = client.server_info()
        assert info.for_options(LabelOptions(agreement=True, branch=Branch.TEACHER)).model.name == "cats"
        assert info.for_options(LabelOptions(model="dogs", branch=Branch.STUDENT)).branches == (Branch.STUDENT,)
        with pytest.raises(InvalidRequest, match=r"^branch: mixed; .*'dogs'.*--branch"):
            info.for_options(LabelOptions(model="dogs", branch=Branch.MIXED))
        with pytest.raises(InvalidRequest, match=r"^agreement: true; .*'dogs'") as caught:
            info.for_options(LabelOptions(model="dogs", agreement=True))
        assert [violation.field for violation in caught.value.violations] == ["agreement"]
        with pytest.raises(InvalidRequest, match="'dog'") as caught:
            info.for_options(LabelOptions(model="dog", agreement=True))
        assert caught.value.reason == "MODEL_NOT_FOUND"


def test_the_named_model_answers(address: str) -> None:
    with Client(address) as client:
        (label,) = client.label_image(DISC_PNG, [DISC_BOX], LabelOptions(model="dogs"))
        assert label.model is not None
        assert label.model.name == "dogs"
        info = client.server_info()
        assert (info.model.name, info.of_model("dogs").model.name) == ("cats", "dogs")
        with pytest.raises(InvalidRequest, match="cats, dogs"):
            info.of_model("mice")


def test_a_dataset_is_labeled_by_the_named_model(address: str, tmp_path: Path) -> None:
    (tmp_path / "disc.png").write_bytes(DISC_PNG)
    rows = {
        "images": [{"id": 1, "file_name": "disc.png", "width": 60, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": list(DISC_BOX)}],
        "categories": [{"id": 1, "name": "disc"}],
    }
    (tmp_path / "in.json").write_text(json.dumps(rows))
    with Client(address) as client:
        named = LabelOptions(model="dogs")
        result = client.label_dataset(tmp_path / "in.json", tmp_path, tmp_path / "out.json", named)
    assert result.model is not None
    assert (result.labeled, result.model.name) == (1, "dogs")


@pytest.mark.parametrize(
    ("branch", "options", "words"),
    [
        (types_pb2.BRANCH_STUDENT, LabelOptions(), ""),
        (types_pb2.BRANCH_TEACHER, LabelOptions(branch=Branch.STUDENT), ""),
        (
            types_pb2.BRANCH_TEACHER,
            LabelOptions(),
            " for one pass of the student, not for: branch teacher",
        ),
        (
            types_pb2.BRANCH_STUDENT,
            LabelOptions(flip=True, resolve_overlaps=True),
            " for one pass of the student, not for: a mirrored pass, overlaps resolved",
        ),
    ],
)
def test_a_labeled_file_records_how_far_its_scores_are_calibrated(
    branch: types_pb2.Branch.ValueType, options: LabelOptions, words: str
) -> None:
    model = model_pb2.ModelInfo(ref=types_pb2.ModelRef(name="cats", branch=branch), score_calibrated=True)
    info = labeling_messages.server_info(model_pb2.GetServerInfoResponse(model=model))
    assert provenance_of(info, options)["score"] == f"expected IoU, calibrated{words}"


def test_a_labeled_file_states_that_scores_are_calibrated_for_resolved_overlaps() -> None:
    model = model_pb2.ModelInfo(score_calibrated=True, score_calibrated_resolved=True)
    info = labeling_messages.server_info(model_pb2.GetServerInfoResponse(model=model))
    assert provenance_of(info, LabelOptions(resolve_overlaps=True))["score"] == "expected IoU, calibrated"
    assert labeling_messages.model_info(model).score_calibrated_resolved
