"""The files of a data set that is cut into shards: patterns, folders, and which files are the test split."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from genkit.core.hub import HUB_NAME, call_hub
from genkit.core.messages import warn_once
from genkit.data.classes import sort_naturally
from genkit.data.source import Split, check_split

TEST_STEMS = ("test", "validation", "valid", "val")
STEM = re.compile(r"(train(?:ing)?|test|validation|valid|val)(?![a-z])")  # of a file's name; not of valley.tar
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
DATASET = re.compile(rf"hf://datasets/({HUB_NAME.pattern})(?:@([^/]+))?(?:/(.*))?")


def expand_ranges(pattern: str) -> list[str]:
    """The names that ``shard-{000..099}.tar`` stands for, in order; several ranges are combined."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    if int(last) < int(first) or int(last) - int(first) > 10**7:
        raise ValueError(f"root: given {pattern}; a range {{A..B}} goes from a number A up to B")
    names = (pattern[: match.start()] + str(i).zfill(len(first)) + pattern[match.end() :]
             for i in range(int(first), int(last) + 1))  # fmt: skip
    return [name for part in names for name in expand_ranges(part)]


def is_pattern(root: str) -> bool:
    """Whether ``root`` stands for several files."""
    return bool(RANGE.search(root)) or glob.has_magic(root)


def match_files(pattern: str) -> list[Path]:
    """The files of a pattern, or the one file that it names; [] if a glob matches none, or a single file is missing.

    ``ValueError`` if a file of a range is missing.
    """
    expanded = str(Path(pattern).expanduser())
    if RANGE.search(expanded):
        paths = [Path(name) for name in expand_ranges(expanded)]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"{missing[0]}: there is no such file; {pattern} needs {len(paths)}")
        return paths
    if Path(expanded).is_file():
        return [Path(expanded)]
    return [Path(name) for name in sort_naturally(glob.glob(expanded)) if Path(name).is_file()]


def list_shards(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of these suffixes in a folder, or else in its folder ``data``, in natural order."""
    for place in (folder, folder / "data"):
        names = [p.name for p in place.iterdir() if p.suffix in suffixes and p.name[0] != "."] if place.is_dir() else []
        if names:
            return [place / name for name in sort_naturally(names)]
    return []


def find_shards(root: str, split: Split, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files of ``split`` and those of the training split, which determines the classes.

    ``root`` is a file, a pattern, or a folder: of files, whose names begin with the word train, test, validation, valid
    or val if they are of that split; or of the folders train and test; or a data set of the hub (:func:`find_local`).
    ``ValueError`` if there are none.
    """
    check_split(split)
    local = find_local(root, suffixes)
    top = Path(local).expanduser()
    if top.is_dir():
        train, test = split_folder(top, suffixes)
    else:
        train = match_files(local)
        name = top.name
        others = (Path(local).with_name(name.replace("train", stem)) for stem in TEST_STEMS) if "train" in name else ()
        test = next((found for other in others if (found := match_test(str(other)))), [])
    if not train:
        raise ValueError(f"{root}: matches no {' or '.join(suffixes)} files; name yours with --data.root")
    if wrong := next((path for path in train if path.suffix not in suffixes), None):
        raise ValueError(f"{wrong}: is no {' or '.join(suffixes)} file")
    if split == "test" and not test:
        raise ValueError(f"{root}: has no test split; name files train-*{suffixes[0]} and test-*{suffixes[0]}, or hold "
                         "out a share: --data.held-out 0.1")  # fmt: skip
    return (test if split == "test" else train), train


def match_test(pattern: str) -> list[Path]:
    """:func:`match_files` without complaint: the test split may have fewer files."""
    try:
        return match_files(pattern)
    except ValueError:
        return []


def split_folder(top: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The training and the test files in a folder."""
    if (top / "train").is_dir():
        tests = (list_shards(top / stem, suffixes) for stem in TEST_STEMS)
        return list_shards(top / "train", suffixes), next((found for found in tests if found), [])
    splits: dict[str, list[Path]] = {}
    for path in list_shards(top, suffixes):
        match = STEM.match(path.name)
        splits.setdefault("train" if match and match[1] == "training" else match[1] if match else "", []).append(path)
    test = next((splits[stem] for stem in TEST_STEMS if stem in splits), [])
    others = splits.get("", [])
    if "train" in splits and others:
        warn_once(f"{top}: {len(others)} files are of no split by their names, and were left out: {others[0].name}"
                  + ", ..." * (len(others) > 1))  # fmt: skip
    return splits.get("train", others), test


def is_remote(root: str) -> bool:
    """Whether ``root`` is no path of this machine."""
    return "://" in root or root.startswith("pipe:")


def find_local(root: str, suffixes: Sequence[str]) -> str:
    """``root``, or the local copy of ``hf://datasets/OWNER/NAME[@REVISION][/FILES]``, which is downloaded if need be.

    FILES is a file, a pattern or a folder of the data set; none: all of its files of these suffixes. They lie in the
    cache of the hub's own library, by commit; without a network, those that were downloaded last are taken.
    ``ValueError`` for other addresses, and for programs.
    """
    if not is_remote(root):
        return root
    match = DATASET.fullmatch(root)
    if match is None:
        raise ValueError(
            f"{root}: data are read from local files, or from hf://datasets/OWNER/NAME[@REVISION][/FILES]; download "
            "them, and name the folder with --data.root"
        )
    repo, revision, files = match[1], match[2], (match[3] or "").strip("/")
    if files.endswith(tuple(suffixes)):
        patterns = expand_ranges(files)
    else:
        patterns = [f"{files}/*{suffix}" if files else f"*{suffix}" for suffix in suffixes]
    folder = call_hub("root", repo, lambda hub: hub.snapshot_download(
        repo, repo_type="dataset", revision=revision, allow_patterns=patterns))  # fmt: skip
    return str(Path(folder, files))
