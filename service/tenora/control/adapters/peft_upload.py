"""Bringing a PEFT adapter's two files into staging, from an upload or from a directory that the operator allows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tenora.adapters.digest import CONFIG_NAME, WEIGHTS_NAME
from tenora.control.storage.directory import full_disk
from tenora.errors import AdapterFormatError, PayloadTooLargeError, PermissionDeniedError

LARGEST_CONFIG = 1 << 20


def stage_upload(directory: str, config: bytes, weights: str, max_bytes: int) -> None:
    """Make `directory` a PEFT directory of these two files, whose content is not looked at here."""
    if len(config) > LARGEST_CONFIG:
        raise PayloadTooLargeError(f"{CONFIG_NAME} may have at most {LARGEST_CONFIG} bytes.")
    size = Path(weights).stat().st_size
    if size > max_bytes:
        raise PayloadTooLargeError(
            f"{WEIGHTS_NAME} has {size} bytes and may have {max_bytes}; see TENORA_MAX_ADAPTER_BYTES."
        )
    with full_disk():
        made = Path(directory)
        made.mkdir(mode=0o700)
        (made / CONFIG_NAME).write_bytes(config)
        # A copy, never a link: what lies at `weights` may be changed by its owner later, and a version may not.
        shutil.copyfile(weights, made / WEIGHTS_NAME)


def check_loadable(path: str, allowed: Sequence[str]) -> tuple[bytes, str]:
    """The config and the path of the weights of a PEFT directory under one of the `allowed` directories.

    Links are followed before the check, of the directory and of both files, so none leads out.

    Raises:
        PermissionDeniedError: not under an allowed directory, or not there (the answer does not tell which).
        AdapterFormatError: the directory lacks one of the files.
    """
    roots = [Path(root).expanduser().resolve() for root in allowed]
    directory = _inside(Path(path), roots)
    try:
        config, weights = _inside(directory / CONFIG_NAME, roots), _inside(directory / WEIGHTS_NAME, roots)
    except PermissionDeniedError as error:
        raise AdapterFormatError(f"The directory must hold {CONFIG_NAME} and {WEIGHTS_NAME}.") from error
    with config.open("rb") as file:
        return file.read(LARGEST_CONFIG + 1), str(weights)


def _inside(path: Path, roots: Sequence[Path]) -> Path:
    try:
        real = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        real = None
    if real is None or not any(real.is_relative_to(root) for root in roots):
        raise PermissionDeniedError(
            "lora_path must be a directory under one of TENORA_ADAPTER_DIRS; ask the operator to list it.",
            code="path_not_allowed",
        )
    return real
