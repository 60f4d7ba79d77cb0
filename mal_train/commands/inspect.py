"""`mal-train inspect`: describes what a checkpoint holds."""

import json
from collections.abc import Iterator
from pathlib import Path

from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import CheckpointSummary, read_header, sha256_of
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.labeler.load import calibration_of


def description(path: Path, key: DecryptionKey | None) -> Iterator[str]:
    """Yields the lines that describe a checkpoint; of an encrypted one without a key, the file alone.

    Raises:
        CheckpointError: see `read_header`.
    """
    header = read_header(path, key)
    sha256 = sha256_of(path)
    yield f"file        {path}, {header.file_bytes} bytes"
    yield f"sha256      {sha256}"
    yield f"encryption  {header.encryption.mode}"
    if header.content is None:
        yield "content     encrypted; --key env:NAME or --key file:PATH decrypts it"
    else:
        yield from _content(header.content, sha256)


def _content(content: CheckpointSummary, sha256: str) -> Iterator[str]:
    int8 = calibration_of(sha256, content.int8)
    yield f"schema      {content.schema}"
    yield f"kind        {content.kind}: {content.tensors} tensors, {content.tensor_bytes} bytes"
    yield f"model       {json.dumps(content.model.to_dict())}"
    yield f"labeler     {json.dumps(content.labeler.summary())}"
    yield f"int8        {f'calibrated on {int8.crops} crops' if int8 else 'not calibrated'}"
    yield f"categories  {len(content.categories)}"
    for field, value in builtin.with_card(sha256, content.provenance).items():
        yield f"            {field}: {value}"
