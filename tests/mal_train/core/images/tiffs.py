"""A TIFF writer for tests, of any values, bands, byte order, blocks and directory."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

JPEG, DEFLATE = 7, 8
_KINDS = {"u": 1, "i": 2, "f": 3, "c": 6}


def tiff_of(
    values: np.ndarray[Any, Any],
    *,
    order: str = "<",
    big: bool = False,
    tile: int = 0,
    rows_per_strip: int = 0,
    planar: bool = False,
    deflate: bool = True,
    jpeg: bool = False,
    predictor: int = 1,
    photometric: int | None = None,
    extra: tuple[int, ...] = (),
    nodata: str = "",
    sparse: frozenset[int] = frozenset(),
    more: tuple[tuple[int, int, tuple[int, ...]], ...] = (),
) -> bytes:
    """Returns a TIFF of an array (H, W) or (H, W, bands).

    Args:
        values: the pixels.
        order: byte order, "<" or ">".
        big: BigTIFF.
        tile: side of square tiles; 0: strips.
        rows_per_strip: rows of a strip; 0: one strip.
        planar: store each band by itself.
        deflate: compress.
        jpeg: compress blocks of 8 bits as JPEG instead.
        predictor: 1, 2 for differences, or 3 for those of the bytes of floating-point numbers.
        photometric: None: 1 (gray) for one or two bands and for more than four, else 2 (RGB).
        extra: meaning of the bands beyond those of the color.
        nodata: value of GDAL's tag.
        sparse: numbers of blocks that are not stored.
        more: further tags: number, type 3 or 4, values.
    """
    table = values if values.ndim == 3 else values[:, :, None]
    height, width, bands = table.shape
    kind = table.dtype
    planes = [table[:, :, band : band + 1] for band in range(bands)] if planar else [table]
    block_width, block_height = (tile, tile) if tile else (width, rows_per_strip or height)
    data, offsets, sizes = bytearray(16), list[int](), list[int]()
    for plane in planes:
        for top in range(0, height, block_height):
            for left in range(0, width, block_width):
                block = plane[top : top + block_height, left : left + block_width]
                if tile:
                    block = np.pad(block, [(0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0)])
                if predictor == 2:
                    unsigned = np.ascontiguousarray(block).view(f"u{kind.itemsize}")
                    block = np.diff(unsigned, axis=1, prepend=unsigned.dtype.type(0))
                elif predictor == 3:
                    wide = np.ascontiguousarray(block.astype(kind.newbyteorder(">"))).view(np.uint8)
                    of_bytes = wide.reshape(len(block), -1, kind.itemsize).swapaxes(1, 2)
                    of_bytes = of_bytes.reshape(len(block), -1, block.shape[2])
                    block = np.diff(of_bytes, axis=1, prepend=np.uint8(0))
                content = block.astype(block.dtype.newbyteorder(order)).tobytes()
                if jpeg:
                    content = _jpeg(block)
                elif deflate:
                    content = zlib.compress(content, 1)
                content = b"" if len(offsets) in sparse else content
                offsets.append(len(data) if content else 0)
                sizes.append(len(content))
                data += content
    color = photometric if photometric is not None else 2 if bands in (3, 4) else 1
    shape = ((322, 4, (tile,)), (323, 4, (tile,))) if tile else ((278, 4, (block_height,)),)
    tags: list[tuple[int, int, tuple[int, ...]]] = [
        *((256, 4, (width,)), (257, 4, (height,)), (258, 3, (8 * kind.itemsize,) * bands)),
        *((259, 3, (JPEG if jpeg else DEFLATE if deflate else 1,)), (262, 3, (color,)), (277, 3, (bands,))),
        *((284, 3, (2 if planar else 1,)), (317, 3, (predictor,)), (339, 3, (_KINDS[kind.kind],) * bands)),
        *shape,
        *more,
    ]
    tags += [(324 if tile else 273, 16 if big else 4, tuple(offsets)), (325 if tile else 279, 4, tuple(sizes))]
    tags += [(338, 3, extra)] if extra else []
    replaced = {tag[0]: tag for tag in tags}
    return _with_directory(data, [*replaced.values()], nodata, order, big)


def _jpeg(block: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(block[:, :, 0] if block.shape[2] == 1 else block)
    image.save(buffer, "JPEG", keep_rgb=True)
    return buffer.getvalue()


def packed_tiff_of(values: np.ndarray[Any, Any], bits: int, **options: Any) -> bytes:
    """Returns a TIFF of an array (H, W) of values of 9 to 15 bits, which are packed."""
    bit_rows = (values[:, :, None].astype(np.uint16) >> np.arange(bits - 1, -1, -1, dtype=np.uint16)) & 1
    packed = np.packbits(bit_rows.reshape(len(values), -1).astype(np.uint8), axis=1)
    return tiff_of(packed, more=((256, 4, (values.shape[1],)), (258, 3, (bits,))), **options)


def repeated_tiff(tile: np.ndarray[Any, Any], across: int) -> bytes:
    """Returns a TIFF of `across` by `across` copies of one RGB tile (T, T, 3), compressed once."""
    side, count = len(tile), across * across
    content = zlib.compress(tile.tobytes())
    data = bytearray(16) + content * count
    offsets = tuple(range(16, len(data), len(content)))
    tags: list[tuple[int, int, tuple[int, ...]]] = [
        *((256, 4, (side * across,)), (257, 4, (side * across,)), (258, 3, (8,) * 3), (259, 3, (DEFLATE,))),
        *((262, 3, (2,)), (277, 3, (3,)), (284, 3, (1,)), (322, 4, (side,)), (323, 4, (side,))),
        *((324, 4, offsets), (325, 4, (len(content),) * count)),
    ]
    return _with_directory(data, tags, "", "<", big=False)


def _with_directory(
    data: bytearray, tags: list[tuple[int, int, tuple[int, ...]]], nodata: str, order: str, big: bool
) -> bytes:
    formats = {3: "H", 4: "I", 16: "Q"}
    packed = [(tag, kind, len(v), struct.pack(f"{order}{len(v)}{formats[kind]}", *v)) for tag, kind, v in tags]
    if nodata:
        packed.append((42113, 2, len(nodata) + 1, nodata.encode() + b"\0"))
    width, count, place = (8, "Q", "Q") if big else (4, "H", "I")
    entries = b""
    for tag, kind, number, content in sorted(packed):
        value = content.ljust(width, b"\0")
        if len(content) > width:
            data += bytes(len(data) % 2)
            value = struct.pack(order + place, len(data))
            data += content
        entries += struct.pack(f"{order}HH{place}", tag, kind, number) + value
    data += bytes(len(data) % 2)
    mark = b"II" if order == "<" else b"MM"
    head = mark + (
        struct.pack(f"{order}HHHQ", 43, 8, 0, len(data)) if big else struct.pack(f"{order}HI", 42, len(data))
    )
    data[: len(head)] = head
    return bytes(data + struct.pack(order + count, len(packed)) + entries + bytes(width))
