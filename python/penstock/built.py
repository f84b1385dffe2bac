"""Small libraries built against the installed torch, once for each version, and kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

__all__ = ["build"]

_TIME_LIMIT = 180.0  # seconds for the compiler


def build(source: Path, libraries: Sequence[str], includes: Sequence[Path] = ()) -> Path:
    """Return a library built from a source; in the user's cache, where it is from then on.

    Parameters
    ----------
    source
        A C++ file.
    libraries
        Names of libraries of torch's to link to.
    includes
        Directories of headers beside torch's own.

    Raises
    ------
    OSError
        If there is no compiler, or nowhere to keep what it makes.
    subprocess.SubprocessError
        If the compiler fails, or does not end.
    """
    text = source.read_bytes()
    abi = int(torch.compiled_with_cxx11_abi())
    key = hashlib.sha256(b"\0".join((text, torch.__version__.encode(), b"%d" % abi)))
    directory = _cache()
    target = directory / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler; install one, or set CXX")
    place = Path(torch.__file__).parent / "lib"
    handle, name = tempfile.mkstemp(suffix=".so", dir=directory)
    os.close(handle)
    try:
        subprocess.run(
            [
                compiler,
                "-std=c++20",
                "-O1",
                "-shared",
                "-fPIC",
                f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
                *(f"-I{path}" for path in (*cpp_extension.include_paths(), *includes)),
                str(source),
                "-o",
                name,
                f"-L{place}",
                "-Wl,--no-as-needed",
                *(f"-l{library}" for library in libraries),
                f"-Wl,-rpath,{place}",
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT,
        )
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _cache() -> Path:
    """Return a directory that nobody else can write to, since what lies there is loaded."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = Path(base) / "penstock"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = directory.stat()
    if held.st_uid != os.getuid() or held.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {directory}; change its owner or mode")
    return directory
