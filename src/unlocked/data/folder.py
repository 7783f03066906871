"""Images in class folders: DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or DIR/CLASS/*.png, which is then split.

Without labels: all images below DIR/train and DIR/test at any depth, or all below DIR, which are then split.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import BadData
from .images import decode
from .split import Raw, split
from .tensors import no_labels

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_TEST_NAMES = ("test", "validation", "valid", "val")


def read(place: str, options: dict[str, str], size: int | None) -> Raw:
    """The images under a folder; classes are numbered in the alphabetic order of the training folders' names.

    Options: `labels=none`, for images that are in no class folders, or whose folders are of no interest.
    """
    if options and options != {"labels": "none"}:
        given = ", ".join(f"{key}={value}" for key, value in sorted(options.items()))
        raise BadData(f"A folder takes no options but labels=none, and {given} is given; change what follows '?'.")
    root = Path(place).expanduser()
    if not root.is_dir():
        raise BadData(f"There is no folder {str(root)!r}; give an existing one as folder:DIR.")
    tests = [root / name for name in _TEST_NAMES if (root / name).is_dir()]
    if options:
        return _unlabelled(root, tests, size)
    if not (root / "train").is_dir():
        classes = _class_names(root)
        files, labels = _files(root, classes)
        return split(decode(files, lambda i: str(files[i]), size), torch.tensor(labels), root.name)
    if not tests:
        raise BadData(f"The folder {str(root)!r} has train/ but no test/; add one of {', '.join(_TEST_NAMES)}.")
    return _given_split(root, tests[0], size)


def _given_split(root: Path, test: Path, size: int | None) -> Raw:
    classes = _class_names(root / "train")
    for name in _class_names(test):
        if name not in classes:
            raise BadData(
                f"The class {name!r} is in {str(test)!r} but not in training; add it there or remove it here."
            )
    files, labels = _files(root / "train", classes)
    more_files, more_labels = _files(test, _class_names(test), classes)
    both = files + more_files
    x, y = decode(both, lambda i: str(both[i]), size), torch.tensor(labels + more_labels)
    cut = len(files)
    return Raw(x[:cut], y[:cut], x[cut:], y[cut:], root.name)


def _unlabelled(root: Path, tests: list[Path], size: int | None) -> Raw:
    split_by_hand = bool(tests) and (root / "train").is_dir()
    parts = [_images_below(part) for part in ([root / "train", tests[0]] if split_by_hand else [root])]
    files, cut = [file for part in parts for file in part], len(parts[0])
    x, y = decode(files, lambda i: str(files[i]), size), no_labels(len(files))
    return Raw(x[:cut], y[:cut], x[cut:], y[cut:], root.name) if split_by_hand else split(x, y, root.name)


def _images_below(folder: Path) -> list[Path]:
    """At any depth, in the order of their paths; nothing hidden."""
    within = (path.relative_to(folder) for path in folder.rglob("*") if _is_image(path))
    found = sorted(folder / path for path in within if not any(part.startswith(".") for part in path.parts))
    if not found:
        raise BadData(
            f"There is no image below the folder {str(folder)!r}; give one that holds files of the kinds "
            f"{', '.join(sorted(_SUFFIXES))}."
        )
    return found


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise BadData(
            f"The folder {str(folder)!r} has no class folders; put each class's images in a folder of its own."
        )
    return names


def _files(folder: Path, names: list[str], classes: list[str] | None = None) -> tuple[list[Path], list[int]]:
    """The image files in the class folders `names`, in order, and their labels: the positions in `classes`."""
    files: list[Path] = []
    labels: list[int] = []
    for name in names:
        members = sorted(path for path in (folder / name).iterdir() if _is_image(path))
        if not members:
            raise BadData(f"The class folder {str(folder / name)!r} holds no images; add some or remove the folder.")
        files += members
        labels += [(classes or names).index(name)] * len(members)
    return files, labels


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
