"""What throws torch.OutOfMemoryError from the allocator hook: a few lines built against torch.

The type of the exception is torch's own, and the core does not link to torch; so this is compiled
once for each version of torch, when a hard cap is first set, and kept in the user's cache. Where
that is not possible, a request that is refused raises a plain RuntimeError with the same message.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

__all__ = ["find_thrower"]

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("out_of_memory.cpp")
_TIME_LIMIT = 120.0  # seconds for the compiler


def find_thrower() -> int:
    """Return the address of the function that throws, built if need be; 0 if it cannot be had."""
    try:
        path = _built()
        library = ctypes.CDLL(str(path))
        if library.penstock_can_throw_out_of_memory() == 1:
            function = library.penstock_throw_out_of_memory
            return ctypes.cast(function, ctypes.c_void_p).value or 0
        reason = f"{path} does not throw what this torch catches; delete it"
    except subprocess.CalledProcessError as error:
        reason = f"the compiler failed: {error.stderr.strip()[-500:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    _log.warning(
        "requests beyond the cap raise RuntimeError instead of torch.OutOfMemoryError: %s", reason
    )
    return 0


def _built() -> Path:
    source = _SOURCE.read_bytes()
    abi = int(torch.compiled_with_cxx11_abi())
    key = hashlib.sha256(b"\0".join((source, torch.__version__.encode(), b"%d" % abi)))
    directory = _cache()
    target = directory / f"out_of_memory-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler; install one, or set CXX")
    libraries = Path(torch.__file__).parent / "lib"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
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
                *includes,
                str(_SOURCE),
                "-o",
                name,
                f"-L{libraries}",
                "-lc10",
                f"-Wl,-rpath,{libraries}",
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
