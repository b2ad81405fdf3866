"""Files of a source that are left out, counted by kind and named: companions (such as .DS_Store), side files, links.

Decides by name only and opens nothing, so that listing a bucket stays cheap. So a photograph with such a name is left
out too, and named. Names that begin with a dot and are on no list below are photographs like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

MAX_NAMES = 100  # names kept per kind: a source may hold a million companions
MAX_SHOWN_NAMES = 3  # names per kind in a line of text

KINDS = {  # kind, as stored in manifests -> its singular
    "companions": "companion",
    "side files": "side file",
    "repeated folders": "repeated folder",
    "broken links": "broken link",
    "unreadable entries": "unreadable entry",
    "special files": "special file",
    "unfinished files": "unfinished file",
}
COMPANIONS, SIDE_FILES, REPEATED, BROKEN, UNREADABLE, SPECIAL, UNFINISHED = KINDS

# Files that operating systems and network drives write beside the user's. macOS and Windows: the patterns of
# github/gitignore, and AppleDouble (RFC 1740), which keeps the attributes of x in ._x on file systems without room for
# them. The \r of Icon\r is U+F00D on SMB shares, and WSL writes : as U+F03A.
_COMPANION_FILES = {
    *(".ds_store", ".localized", ".lsoverride", ".volumeicon.icns", ".apdisk", "icon\r", "icon\uf00d"),
    *(".com.apple.timemachine.donotpresent", ".metadata_never_index"),
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
    *(".picasa.ini", "picasa.ini", "zbthumbnail.info", ".bridgesort", ".bridgecache", ".bridgecachet"),
    *(".directory", ".nomedia"),  # KDE, Android
}
# attributes that NTFS keeps beside a file
_NTFS_STREAM_SUFFIXES = (
    "zone.identifier",
    ":com.dropbox.attributes",
    ":com.dropbox.attrs",
    ":encryptable",
)
_COMPANION_FOLDERS = {  # thumbnails, snapshots and deleted files: not training data
    *("__macosx", ".appledouble", ".appledb", ".appledesktop", "network trash folder", "temporary items"),
    *(".documentrevisions-v100", ".fseventsd", ".spotlight-v100", ".temporaryitems", ".trashes", ".trash"),
    *("$recycle.bin", "recycler", "system volume information"),
    *("@eadir", "#recycle", "#snapshot"),  # Synology
    *(".@__thumb", "@recycle", "@recently-snapshot"),  # QNAP
    *(".thumbnails",),  # Android, GNOME
}
_USER_TRASH = re.compile(r"\.trash-\d+")  # a user's, on a drive (freedesktop.org)

# Formats that only describe a photograph: Google Takeout and annotations, Adobe, Apple, RawTherapee, DxO. They are
# expected beside photographs and need no warning.
_SIDE_SUFFIXES = ("json", "xml", "xmp", "aae", "pp3", "dop")
# Captions, labels, and the short films of phones: side files only beside a photograph of the same name
_PAIRED_SUFFIXES = ("txt", "caption", "mov", "mp4")
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "tif", "tiff", "bmp", "gif", "avif", "heic", "heif"),
    *("jp2", "j2k", "ppm", "pgm", "pbm", "pnm", "tga", "mpo"),
)
_SUFFIX_KINDS = (
    dict.fromkeys(_SIDE_SUFFIXES, "side")
    | dict.fromkeys(_PAIRED_SUFFIXES, "paired")
    | dict.fromkeys(IMAGE_SUFFIXES, "image")
)


def is_companion(name: str) -> bool:
    """Whether a file name (without path) is one that an operating system writes: ._x.jpg, .DS_Store..."""
    lower = name.lower()
    return lower.startswith("._") or lower in _COMPANION_FILES or lower.endswith(_NTFS_STREAM_SUFFIXES)


def is_companion_folder(name: str) -> bool:
    """Whether a folder name (without path) is one that an operating system uses for itself: __MACOSX, @eaDir..."""
    lower = name.lower()
    return lower in _COMPANION_FOLDERS or _USER_TRASH.fullmatch(lower) is not None


def find_companion(key: str) -> str | None:
    """The key if it is a companion, or the companion folder that it is in, with a trailing '/'; otherwise None."""
    *folders, name = key.split("/")
    for depth, folder in enumerate(folders, 1):
        if is_companion_folder(folder):
            return "/".join(folders[:depth]) + "/"
    return key if is_companion(name) else None


def printable(name: str) -> str:
    """The name with control characters and bytes that are not UTF-8 escaped, safe to print and store."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class LeftOutEntry:
    """Number of entries of one kind, and the printable names of the first MAX_NAMES."""

    count: int
    names: tuple[str, ...]


class LeftOut:
    """Collects the entries that are left out, by kind: their number and the names of the first MAX_NAMES."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(KINDS, 0)
        self._names: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, name: str, reason: str = "") -> None:
        """Count one entry of `kind` (of KINDS); `reason` is appended to its name."""
        self._counts[kind] += 1
        if len(self._names[kind]) < MAX_NAMES:
            self._names[kind].append(printable(f"{name}: {reason}" if reason else name))

    @property
    def total(self) -> int:
        return sum(self._counts.values())

    def entries(self) -> dict[str, LeftOutEntry]:
        """The kinds with at least one entry, in the order of KINDS."""
        return {
            kind: LeftOutEntry(count, tuple(self._names[kind]))
            for kind, count in self._counts.items()
            if count
        }

    def __str__(self) -> str:
        return "; ".join(left_out_lines(self.entries()))


def left_out_lines(left_out: Mapping[str, LeftOutEntry], max_names: int = MAX_SHOWN_NAMES) -> list[str]:
    """A manifest's `left_out` as text, one line per kind: '5 companions (.DS_Store, ._a.jpg, ._b.jpg and 2 more)'."""
    lines = []
    for kind, entry in left_out.items():
        count, names = entry.count, [printable(name) for name in entry.names[:max_names]]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        lines.append(f"{count} {KINDS.get(kind, kind) if count == 1 else kind} ({', '.join(names)}{more})")
    return lines


def left_out_total(left_out: Mapping[str, LeftOutEntry]) -> int:
    return sum(entry.count for entry in left_out.values())


def exclude_side_files(entries: Iterable[tuple[str, int]], left_out: LeftOut) -> Iterator[tuple[str, int]]:
    """Yields the `entries` (key, bytes; sorted by key) that are not side files, and adds the others to `left_out`.

    Keys with a common stem are adjacent, so it holds back only a few entries to know whether a caption has a
    photograph.
    """
    images: set[str] = set()  # keys that begin with `stem_prefix`, with and without their suffix
    stem_prefix = "\0"
    pending: list[tuple[str, int]] = []  # from a caption on whose photograph may follow
    pending_prefix = ""  # it may follow while keys begin with this
    for entry in entries:
        key = entry[0]
        if pending and not key.startswith(pending_prefix):
            yield from _exclude_paired(pending, images, left_out)
            pending = []
        stem, _, suffix = key.rpartition(".")
        kind = _SUFFIX_KINDS.get(suffix.lower())
        if kind == "image":
            if not key.startswith(stem_prefix):
                stem_prefix = f"{stem}."
                if not pending:
                    images.clear()
            images.add(stem)
            images.add(key)
        elif kind == "side" or (kind == "paired" and stem in images):
            left_out.add(SIDE_FILES, key)
            continue
        elif kind == "paired" and not pending:
            pending_prefix = f"{stem}."
            pending.append(entry)
            continue
        if pending:
            pending.append(entry)
        else:
            yield entry
    yield from _exclude_paired(pending, images, left_out)


def _exclude_paired(
    pending: Iterable[tuple[str, int]], images: set[str], left_out: LeftOut
) -> Iterator[tuple[str, int]]:
    for entry in pending:
        stem, _, suffix = entry[0].rpartition(".")
        if _SUFFIX_KINDS.get(suffix.lower()) == "paired" and stem in images:
            left_out.add(SIDE_FILES, entry[0])
        else:
            yield entry
