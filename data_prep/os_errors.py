"""Explains operating-system errors and says what to do."""

from __future__ import annotations

import errno

_EXPLANATIONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.EACCES: "permission denied; check its owner and rights, and those of its folder",
    errno.EPERM: "not permitted; check its owner and rights, and those of its folder",
    errno.ENOTDIR: "there is a file where a folder should be; move it away or choose another folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.EEXIST: "another file or folder of this name exists; move it away or choose another folder",
    errno.ENOENT: "there is no such file or folder",
    errno.EMFILE: "too many open files; raise the limit of this process, for example with `ulimit -n 4096`",
    errno.ENFILE: "this machine has too many open files; end the programs that have them open",
    errno.ENOMEM: "there is no memory left on this machine; end other programs",
    errno.EIO: "the disk or its network fails (input/output error); look at the system's log",
    errno.ESTALE: "the network file system has lost it; mount it again",
    errno.ELOOP: "its symbolic links form a loop",
}


def explain_os_error(error: OSError) -> str:
    """What is wrong and what to do, without the file's name; for rare errors the system's own text."""
    return _EXPLANATIONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
