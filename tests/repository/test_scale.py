"""`python -m benchmarks.scale`: the table of docs/scale.md, and rates that no machine has."""

import pytest

from benchmarks.scale import main
from tests.paths import ROOT


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|") and "---" not in line]


def test_the_page_has_the_table_that_is_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scale"])
    main()
    computed = rows(capsys.readouterr().out)
    page = rows((ROOT / "docs" / "scale.md").read_text())
    assert len(computed) > 10
    assert page[: len(computed)] == computed


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--shards", "0"], ["--shards", "-5"], ["--shards", "x"], ["--set", "boxes_per_image=0"]),
        *(["--set", "image_bytes=nan"], ["--set", "json_bytes=inf"], ["--set", "client_s=-1"], ["--set", "pace=1"]),
        *(["--model", "gpu"], ["--model", "=3"], ["--model", "gpu=0"]),
    ],
)
def test_rates_that_cannot_be_are_refused_by_name(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scale", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert arguments[0] in output.err
    assert arguments[1].partition("=")[0] in output.err
    assert not output.out
