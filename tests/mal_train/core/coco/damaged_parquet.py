"""Reads damaged copies of a parquet file, in a process of its own: `python -m … FOLDER SEED COUNT`.

A library in C++ may abort its process. Prints the number of cases by outcome, and the peak of memory, as JSON.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

from benchmarks.timing import peak_mib
from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.parquet_schema import METADATA_KEY, load_pyarrow
from mal_train.core.coco.stream import write_coco
from mal_train.core.errors import BadDataset
from tests.mal_train.core.coco.coco_rows import dataset, row

COMPRESSIONS = ("zstd", "snappy", "none")


def write_files(folder: Path) -> list[bytes]:
    """Returns files in the form: one as this project writes it, and others without checksums of their pages."""
    pa, pq = load_pyarrow()
    images = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in range(20)]
    rows = [
        row(n, image_id=n % 22, segmentation={"size": [4, 4], "counts": "a" * (n % 9)}, note="x" * (n % 7), flags=["A"])
        for n in range(100)
    ]
    path = folder / "good.parquet"
    write_coco(path, dataset(*rows, images=images))
    files = [path.read_bytes()]
    metadata = pq.ParquetFile(path).metadata.metadata
    table = pq.read_table(path).replace_schema_metadata({METADATA_KEY: metadata[METADATA_KEY]})
    for compression in COMPRESSIONS:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression=compression)
        files.append(sink.getvalue().to_pybytes())
    return files


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Returns a copy with a few changed bytes, most of them in the footer."""
    changed = bytearray(content)
    footer = int.from_bytes(content[-8:-4], "little") + 8
    for _ in range(chance.choice((1, 1, 2, 5))):
        start = len(changed) - footer if chance.random() < 0.6 else 0
        at, other, length = (
            chance.randrange(start, len(changed)),
            chance.randrange(len(changed)),
            chance.randrange(1, 9),
        )
        match chance.randrange(4):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at] = chance.choice((0, 255, 127, 128))
            case 2:
                changed[at : at + 4] = chance.randbytes(4)
            case _:
                changed[at : at + length] = changed[other : other + length]
    return bytes(changed)


def outcome(path: Path) -> str:
    """Returns "result" or the name of the error, which must be clear and name the file."""
    try:
        read_coco(path)
    except BadDataset as error:
        return "BadDataset" if path.name in str(error) and len(str(error)) < 3000 else f"unclear: {error}"
    return "result"


def main(folder: Path, seed: str, count: int) -> None:
    """Reads `count` damaged files; an error other than BadDataset ends the process with a traceback."""
    files = write_files(folder)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        path = folder / "damaged.parquet"
        path.write_bytes(damaged(chance.choice(files), chance))
        print(f"case {number}", file=sys.stderr)
        outcomes[outcome(path)] += 1
    # Not ru_maxrss, which begins with the memory of the process that forked this one.
    print(json.dumps({**outcomes, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
