"""Computes what labeling 10⁶ to 10⁹ boxes takes, from measured rates: `python -m benchmarks.scale`.

Nothing is simulated: each line is a product of the number of boxes and rates that other benchmarks measure. The
defaults are those of docs/results.md; replace them by your own:

    python -m benchmarks.scale --set image_bytes=2e6 --set boxes_per_image=3 --model my-gpu=0.0004

`--model NAME=SECONDS` gives the time of one box on one device, or the CPU time of one box.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

HOUR, DAY = 3600.0, 86_400.0
SIZES = (10**6, 10**8, 10**9)


@dataclass(frozen=True)
class Rates:
    """Measured rates of one box, unless their names say otherwise; bytes, and seconds of CPU time.

    Attributes:
        boxes_per_image: mean of `coco_val_dev`.
        image_bytes: mean size of its JPEG files.
        json_bytes: a row of a COCO file with its share of the image rows.
        parquet_bytes: the same in the parquet form.
        labeled_bytes: a row with its mask, in the output or in a journal.
        response_bytes: a mask on the wire.
        json_scan_s: reading a COCO file from beginning to end, as every shard does.
        parquet_share_s: reading the row groups of a shard, per box of the shard.
        footer_s: reading the footer of a parquet file, per box of the whole file.
        json_memory_bytes: memory of a process that has scanned a COCO file.
        share_memory_bytes: memory of a process that has read its row groups, per box of the shard.
        client_s: CPU time of `mal-client label`.
    """

    boxes_per_image: float = 8.03
    image_bytes: float = 154e3
    json_bytes: float = 133.0
    parquet_bytes: float = 20.3
    labeled_bytes: float = 503.0
    response_bytes: float = 340.0
    json_scan_s: float = 9.33e-6
    parquet_share_s: float = 6.53e-6
    footer_s: float = 0.46e-9
    json_memory_bytes: float = 105.0
    share_memory_bytes: float = 139.0
    client_s: float = 157e-6


MODELS = {
    "built-in model, crop 224": 0.0432,
    "ViT-small, crop 512": 0.588,
    "ViT-base, crop 512": 1.46,
}
"""CPU seconds of one box in bfloat16."""

Line = tuple[str, Callable[[float], str]]


def lines(rates: Rates, models: dict[str, float], shards: int) -> list[Line]:
    """Returns the name of each line of the table, and its value as a function of the number of boxes."""
    image_bytes = rates.image_bytes / rates.boxes_per_image
    return [
        ("images", lambda boxes: count(boxes / rates.boxes_per_image)),
        ("images, read once", lambda boxes: size(boxes * image_bytes)),
        ("annotations, JSON", lambda boxes: size(boxes * rates.json_bytes)),
        ("annotations, parquet", lambda boxes: size(boxes * rates.parquet_bytes)),
        ("results", lambda boxes: size(boxes * rates.labeled_bytes)),
        ("masks on the wire", lambda boxes: size(boxes * rates.response_bytes)),
        ("CPU time of the clients", lambda boxes: duration(boxes * rates.client_s)),
        *((name, _work(seconds, "cores" if name in MODELS else "devices")) for name, seconds in models.items()),
        (f"JSON scanned by {shards} shards", lambda boxes: duration(boxes * rates.json_scan_s * shards)),
        (f"parquet read by {shards} shards", lambda boxes: duration(_parquet_s(rates, boxes, shards))),
        ("memory of each process, JSON", lambda boxes: size(boxes * rates.json_memory_bytes)),
        ("memory of each process, parquet", lambda boxes: size(boxes / shards * rates.share_memory_bytes)),
    ]


def machines(boxes: float, seconds_per_box: float, deadline_s: float) -> float:
    """Returns the number of cores, or of devices, that label the boxes in time."""
    return boxes * seconds_per_box / deadline_s


def table(rates: Rates, models: dict[str, float], shards: int, sizes: Sequence[int] = SIZES) -> str:
    """Returns the table in Markdown."""
    rows = [(name, *(value(boxes) for boxes in sizes)) for name, value in lines(rates, models, shards)]
    return _markdown(("boxes", *map(count, sizes)), rows)


def _work(seconds: float, unit: str) -> Callable[[float], str]:
    return lambda boxes: f"{duration(boxes * seconds)}; {count(machines(boxes, seconds, DAY))} {unit} for a day"


def _parquet_s(rates: Rates, boxes: float, shards: int) -> float:
    return boxes * rates.parquet_share_s + boxes * rates.footer_s * shards


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count(number: float) -> str:
    """Returns a number with two digits, and the name of its thousands.

    >>> count(0.43), count(12.5), count(1_250_000), count(1e9)
    ('0.43', '12', '1.2 million', '1 billion')
    """
    for limit, unit in ((1e9, " billion"), (1e6, " million"), (1e4, " thousand")):
        if number >= limit:
            return _digits(number / (1e3 if limit == 1e4 else limit)) + unit
    return _digits(number)


def size(number: float) -> str:
    """Returns bytes with a decimal unit.

    >>> size(2_000_000), size(19.2e12)
    ('2 MB', '19 TB')
    """
    for limit, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= limit:
            return f"{_digits(number / limit)} {unit}"
    return f"{_digits(number / 1e3)} kB"


def duration(seconds: float) -> str:
    """Returns a duration in seconds, hours or years of 365 days.

    >>> duration(90), duration(43_200), duration(3.2e8)
    ('90 s', '12 h', '10 years')
    """
    for limit, unit in ((365 * DAY, "years"), (HOUR, "h")):
        if seconds >= limit:
            return f"{_digits(seconds / limit)} {unit}"
    return f"{_digits(seconds)} s"


def _digits(number: float) -> str:
    """Rounds to two digits, without an exponent."""
    return f"{float(f'{number:.2g}'):g}"


def _assignment(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not name or not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; give NAME=NUMBER with a number above 0")
    return name, number


def _shards(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; give a number of processes, 1 or more")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute what labeling many boxes takes.")
    parser.add_argument("--set", action="append", default=[], type=_assignment, metavar="RATE=NUMBER")
    parser.add_argument("--model", action="append", default=[], type=_assignment, metavar="NAME=SECONDS")
    parser.add_argument(
        "--shards", type=_shards, default=1000, help="processes that read the file (default: %(default)d)"
    )
    args = parser.parse_args()
    known = {field.name for field in dataclasses.fields(Rates)}
    unknown = [name for name, _ in args.set if name not in known]
    if unknown:
        parser.error(f"--set {unknown[0]}: no such rate; the rates are {', '.join(sorted(known))}")
    rates = dataclasses.replace(Rates(), **dict(args.set))
    print(table(rates, MODELS | dict(args.model), args.shards))


if __name__ == "__main__":
    main()
