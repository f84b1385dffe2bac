"""Small libraries built against the installed torch, once for each version, and kept.

As a script, `python built_libraries.py DIRECTORY` puts the extension that needs nothing but torch
into a directory: the package's own build calls it so, with whatever torch its interpreter has.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "build",
    "build_extension",
    "prebuilt_directory",
    "toolkit_headers",
    "torch_dispatch_sources",
]

_SOURCE_LIMIT = 180.0  # seconds for the compiler, for one file
_ROOM_LIMIT = 900.0
_ROOM = "torch_dispatch"
_HEADER = "cuda_runtime_api.h"
_PACKAGE = Path(__file__).resolve().parent


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
    torch = _torch()
    key = _key([source.read_bytes(), torch.__version__.encode(), b"%d" % _abi(torch)])
    target = _cache() / f"{source.stem}-{key}.so"
    if not target.exists():
        headers = [f"-I{path}" for path in (*_torch_headers(torch), *includes)]
        _compile(target, [*headers, "-O1", str(source)], libraries, time_limit=_SOURCE_LIMIT)
    return target


def build_extension(sources: Path, prebuilt: Path | None = None) -> Path:
    """Return the Python extension of a room of the sources that includes torch.

    All of its sources are compiled as one. It is looked for among the prebuilt libraries, then in
    the user's cache, and built into the cache where it is in neither.

    Parameters
    ----------
    sources
        The directory in which the room and the headers it includes lie; see
        `torch_dispatch_sources`.
    prebuilt
        A directory of libraries that came with the package.

    Raises
    ------
    OSError
        If the sources are not there, or there is no compiler, no headers of CUDA where torch has
        CUDA, or nowhere to keep what is made.
    subprocess.SubprocessError
        If the compiler fails, or does not end.
    """
    name = _extension_name(sources)
    if prebuilt is not None and (prebuilt / name).exists():
        return prebuilt / name
    target = _cache() / name
    if not target.exists():
        _compile_room(sources, target)
    return target


def prebuilt_directory() -> Path:
    """Return where libraries that came with the package lie, whether there are any or not."""
    return _PACKAGE / "prebuilt"


def torch_dispatch_sources() -> Path:
    """Return the directory of the sources, in the package or in the repository."""
    packed = _PACKAGE / "torch_dispatch_sources"
    return packed if packed.is_dir() else _PACKAGE.parents[1] / "csrc"


def _compile_room(sources: Path, target: Path) -> None:
    torch = _torch()
    place = sysconfig.get_path("include")
    headers = [f"-I{sources}"]
    headers += [f"-isystem{path}" for path in (*_torch_headers(torch), place)]
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    if torch.version.cuda is not None:
        headers += [f"-isystem{toolkit_headers()}", "-DPENSTOCK_TORCH_CUDA"]
        libraries += ["c10_cuda"]
    files = sorted((sources / _ROOM).glob("*.cpp"))
    unity = "".join(f'#include "{_ROOM}/{file.name}"\n' for file in files)
    flags = [*headers, "-O2", "-fvisibility=hidden", "-x", "c++", "-"]
    _compile(target, flags, libraries, time_limit=_ROOM_LIMIT, text=unity)


def _compile(
    target: Path,
    flags: Iterable[str],
    libraries: Iterable[str],
    *,
    time_limit: float,
    text: str | None = None,
) -> None:
    """Compile and link to torch's libraries; the target appears only when it is whole."""
    torch = _torch()
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler; install one, or set CXX")
    place = _torch_place(torch) / "lib"
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        subprocess.run(
            [
                compiler,
                "-std=c++20",
                "-shared",
                "-fPIC",
                f"-D_GLIBCXX_USE_CXX11_ABI={_abi(torch)}",
                *flags,
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
            input=text,
            timeout=time_limit,
        )
        Path(name).chmod(0o755)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _extension_name(sources: Path) -> str:
    torch = _torch()
    files = sorted(path for path in sources.glob(f"{_ROOM}/*.?pp") if path.is_file())
    if not files:
        raise FileNotFoundError(f"there are no sources in {sources / _ROOM}")
    files.append(sources / "paging" / "paging_api.hpp")
    parts = [part for path in files for part in (path.name.encode(), path.read_bytes())]
    python = f"{sys.implementation.cache_tag}{sysconfig.get_config_var('abiflags')}".encode()
    parts += [torch.__version__.encode(), b"%d" % _abi(torch), python]
    return f"{_ROOM}-{_key(parts)}.so"


def _key(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _torch() -> ModuleType:
    import torch  # not when this file is loaded: the build of the package may have none

    return torch


def _abi(torch: ModuleType) -> int:
    return int(torch.compiled_with_cxx11_abi())


def _torch_place(torch: ModuleType) -> Path:
    return Path(str(torch.__file__)).parent


def _torch_headers(torch: ModuleType) -> list[Path]:
    place = _torch_place(torch) / "include"
    return [place, place / "torch" / "csrc" / "api" / "include"]


def toolkit_headers() -> Path:
    """Return where a CUDA toolkit's headers are: an installed one's, or of torch's packages."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [packages / name / "include" for name in ("cu13", "cuda_runtime")]
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places[:0] = [Path(root) / "include" for root in roots if root]
    for place in places:
        if (place / _HEADER).exists():
            return place
    raise FileNotFoundError(f"torch has CUDA, but {_HEADER} is neither in {places}; set CUDA_HOME")


def _cache() -> Path:
    """Return a directory that nobody else can write to, since what lies there is loaded."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = Path(base) / "penstock"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = directory.stat()
    if held.st_uid != os.getuid() or held.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {directory}; change its owner or mode")
    return directory


def _main(arguments: Sequence[str]) -> int:
    """Build into a directory, and leave nothing else there."""
    if len(arguments) != 1:
        print("usage: built_libraries.py DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0])
    directory.mkdir(parents=True, exist_ok=True)
    later = "the part of penstock that includes torch will be built on first use"
    # Modules beside this file have names that others of Python's or torch's may have.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != _PACKAGE]
    try:
        if importlib.util.find_spec("torch") is None:
            raise ModuleNotFoundError("no torch")
        sources = torch_dispatch_sources()
        target = directory.resolve() / _extension_name(sources)
    except ImportError as error:
        print(f"{error}: {later}")
        return 0
    for old in directory.glob("*.so"):
        if old.name != target.name:
            old.unlink()
    if target.exists():
        return 0
    try:
        _compile_room(sources, target)
    except subprocess.CalledProcessError as error:
        print(f"the compiler failed: {error.stderr.strip()[-2000:]}: {later}")
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{error}: {later}")
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
