"""Images in parquet files as the public hubs lay them out: train*.parquet and test*.parquet, in DIR or DIR/data.

Each row has an image, encoded (a struct with `bytes`, or the bytes themselves), and an integer label, or none.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..errors import BadData, InvalidChoice, choose
from .images import decode
from .split import Raw, split
from .tensors import no_labels

_IMAGE_COLUMNS = ("img", "image")
_TRAINING_PATTERNS = ("train*.parquet",)
_UNLABELLED_PATTERNS = ("unlabel*.parquet", *_TRAINING_PATTERNS)  # what STL-10's images without labels are called
_TEST_PATTERNS = ("test*.parquet", "validation*.parquet", "valid*.parquet")
_NO_LABEL = "none"  # instead of a column's name
_LABEL_LIMIT = 1 << 31  # beyond it, a number is no class but an identifier
Rows = tuple[list[bytes], list[int], list[str]]


def read(place: str, options: dict[str, str], size: int | None) -> Raw:
    """The images in a directory of parquet files. Options: `label` and `image` name the columns; `label=none`: no labels are
    read, files called unlabel*.parquet go before train*.parquet, and there need be no test files."""
    root = Path(place).expanduser()
    if not root.is_dir():
        what = "is a file, not a directory" if root.exists() else "does not exist"
        raise BadData(f"{str(root)!r} {what}; give the directory that holds train*.parquet and test*.parquet.")
    try:
        for option in options:
            choose("option of parquet:", option, ("label", "image"))
    except InvalidChoice as error:
        raise BadData(str(error)) from error
    unlabelled, name = options.get("label") == _NO_LABEL, root.resolve().name
    patterns = _UNLABELLED_PATTERNS if unlabelled else _TRAINING_PATTERNS
    images, labels, names = _rows(_shards(root, patterns, "training"), options)
    cut = len(images)
    tests = _found(root, _TEST_PATTERNS) if unlabelled else _shards(root, _TEST_PATTERNS, "test")
    more_images, more_labels, more_names = _rows(tests, options) if tests else ([], [], [])
    names += more_names
    x = decode(images + more_images, lambda i: names[i], size)
    y = torch.tensor(labels + more_labels, dtype=torch.int64)
    return Raw(x[:cut], y[:cut], x[cut:], y[cut:], name) if tests else split(x, y, name)


def _found(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of the first pattern that has any, in the directory itself, else in its `data` folder."""
    folders = (root, root / "data")
    found = (sorted(folder.glob(pattern)) for folder in folders for pattern in patterns)
    return next((files for files in found if files), [])


def _shards(root: Path, patterns: tuple[str, ...], role: str) -> list[Path]:
    if found := _found(root, patterns):
        return found
    raise BadData(
        f"No {role} files in {str(root)!r}; it, or its folder 'data', must hold {' or '.join(patterns)}. "
        f"It holds: {', '.join(sorted(entry.name for entry in root.iterdir())[:10]) or 'nothing'}."
    )


def _rows(files: list[Path], options: dict[str, str]) -> Rows:
    """Encoded images, labels, and how to name each row in an error; all shards one after the other."""
    images: list[bytes] = []
    labels: list[int] = []
    names: list[str] = []
    for file in files:
        try:
            more_images, more_labels = _read(file, options)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadData(f"{str(file)!r} cannot be read as parquet ({reason}); is it complete?") from error
        images += more_images
        labels += more_labels
        names += [f"row {row} of {file}" for row in range(len(more_images))]
    if not images:
        raise BadData(f"{', '.join(map(str, files))} holds no rows; give files with images.")
    return images, labels, names


def _read(file: Path, options: dict[str, str]) -> tuple[list[bytes], list[int]]:
    with pq.ParquetFile(file) as opened:
        image, label = _column_names(opened.schema_arrow.names, options, file)
        table = opened.read(columns=[image] if label is None else [image, label])
    images = _images(table.column(image), image, file)
    return images, no_labels(len(images)).tolist() if label is None else _labels(table.column(label), label, file)


def _column_names(present: list[str], options: dict[str, str], file: Path) -> tuple[str, str | None]:
    """Of the images and of the labels, None if there are to be none."""
    wanted = (options["image"],) if "image" in options else _IMAGE_COLUMNS
    image = next((name for name in wanted if name in present), None)
    label = options.get("label", "label")
    if image is not None and (label == _NO_LABEL or label in present):
        return image, None if label == _NO_LABEL else label
    also = "" if label == _NO_LABEL else f" and a label column ({label}; without labels: label=none)"
    raise BadData(
        f"{str(file)!r} has the columns {', '.join(present)}; needed are an image column ({' or '.join(wanted)}){also}. Name "
        "others in the spec, for example parquet:DIR?image=picture&label=fine_label."
    )


def _images(column: pa.ChunkedArray, name: str, file: Path) -> list[bytes]:
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise BadData(
            f"The column {name!r} of {str(file)!r} has the type {kind}; needed is a struct with the field 'bytes', or "
            "binary: encoded images."
        )
    values = column.to_pylist()
    if None in values:
        raise BadData(
            f"Row {values.index(None)} of {str(file)!r} has no image bytes in the column {name!r}; remove it."
        )
    return values


def _labels(column: pa.ChunkedArray, name: str, file: Path) -> list[int]:
    if not pa.types.is_integer(column.type):
        raise BadData(
            f"The labels in the column {name!r} of {str(file)!r} have the type {column.type}; needed are whole numbers "
            "from 0. Name another column with ?label=."
        )
    values = column.to_pylist()
    for row, value in enumerate(values):
        if value is None or not 0 <= value < _LABEL_LIMIT:
            given = "missing" if value is None else str(value)
            raise BadData(f"The label in row {row} of {str(file)!r} is {given}; labels are class numbers from 0.")
    return values
