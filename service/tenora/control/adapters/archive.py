"""A version as a zip: its PEFT directory, and its card."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tenora.adapters.digest import CONFIG_NAME, WEIGHTS_NAME, chunks, content_hasher, damaged
from tenora.adapters.kinds.table import kind_of, read_fields
from tenora.control.adapters.model_card import README_NAME
from tenora.control.storage.directory import full_disk
from tenora.errors import AdapterFormatError


def write_archive(directory: str, digest: str, card: str, archive: str) -> None:
    """Pack a version, its files named as its format has them; they are compared with its digest on their way."""
    config_file, weights_file = Path(directory, CONFIG_NAME), Path(directory, WEIGHTS_NAME)
    readme = zipfile.ZipInfo(README_NAME)  # its time is a constant: equal cards make equal archives
    readme.external_attr = 0o644 << 16
    # Stored, not deflated: trained weights are noise to a compressor.
    with full_disk(), zipfile.ZipFile(archive, "x", zipfile.ZIP_STORED) as file:
        try:
            config = config_file.read_bytes()
            hasher = content_hasher(config)
            file.writestr(zipfile.ZipInfo.from_file(config_file, CONFIG_NAME), config)
            entry = zipfile.ZipInfo.from_file(weights_file, kind_of(read_fields(config)).weights_name)
            with weights_file.open("rb") as weights, file.open(entry, "w") as packed:
                for chunk in chunks(weights):
                    hasher.update(chunk)
                    packed.write(chunk)
        except (FileNotFoundError, AdapterFormatError) as error:
            raise damaged(digest) from error
        file.writestr(readme, card)
    if hasher.hexdigest() != digest:
        raise damaged(digest)
