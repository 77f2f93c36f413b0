"""Find the shards of a pattern, local or remote, and the samples in each."""

import glob
import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from datamodules import remote
from datamodules.index_file import NAME, IndexFile
from datamodules.shards import ShardError, ShardRecord, open_or_explain
from datamodules.staging import Staging


def find_records(pattern: str, config_key: str, staging: Staging | None) -> tuple[list[ShardRecord], list[str] | None]:
    """Return the records of all shards of a pattern, and the class names if an index has them.

    Args:
        pattern: local path or URL with wildcards ``*?[]`` or braces ``{000000..000009}``.
        config_key: named in error messages.
        staging: where remote shards are kept.

    Raises:
        ShardError: if a shard is missing, damaged, differs from the ``index.json`` beside it, or cannot be reached.
    """
    remote.check_location(pattern, config_key)
    if remote.is_remote(pattern):
        return remote_records(pattern, config_key, staging)
    return local_records(pattern, config_key)


def local_records(pattern: str, config_key: str) -> tuple[list[ShardRecord], list[str] | None]:
    """Do the same for local shards."""
    from braceexpand import braceexpand

    patterns = list(braceexpand(pattern))
    present = sorted({path for expanded in patterns for path in glob.glob(expanded)})
    folders = {os.path.dirname(path) for path in (*patterns, *present)}
    indices = {folder: index for folder in sorted(folders) if (index := IndexFile.read(folder or "."))}
    listed = {
        path: record
        for folder, index in indices.items()
        for name, record in index.records.items()
        if any(fnmatchcase(path := os.path.join(folder, name), expanded) for expanded in patterns)
    }
    if not present and not listed:
        raise ShardError(
            f"{config_key}={pattern!r} matches no file. Write shards with: "
            "python -m datamodules.pack --source IMAGE_FOLDER --output FOLDER"
        )
    named = {expanded for expanded in patterns if not glob.has_magic(expanded)}
    missing = sorted((listed.keys() | named) - set(present))
    unlisted = [path for path in present if path not in listed and os.path.dirname(path) in indices]
    for names, problem in ((missing, "listed but missing"), (unlisted, f"there but not listed in {NAME}")):
        if names:
            raise ShardError(
                f"{config_key}={pattern!r}: {len(names)} shards are {problem}, the first is {names[0]}: copy or pack "
                f"them again, or remove {NAME} to have the shards walked"
            )
    for path, record in listed.items():
        record.check(path)
    records = [replace(listed[path], path=path) if path in listed else walked_record(path) for path in present]
    return records, next((index.class_names for index in indices.values() if index.class_names), None)


def remote_records(
    pattern: str, config_key: str, staging: Staging | None
) -> tuple[list[ShardRecord], list[str] | None]:
    """Do the same for remote shards. Without an ``index.json`` beside them, stage and walk all of them."""
    if staging is None:
        raise ShardError(
            f"{config_key}={pattern!r} is remote: set data.init_args.staging.directory to a folder on node-local disk"
        )
    folder = pattern.rpartition("/")[0]
    text = None if any(sign in folder for sign in "{*?[") else remote.read_bytes(f"{folder}/{NAME}")
    index = IndexFile.parse(text, f"{folder}/{NAME}") if text is not None else None
    if index is not None and "{" not in pattern:
        urls = [url for name in sorted(index.records) if fnmatchcase(url := f"{folder}/{name}", pattern)]
    else:
        urls = remote.expand(pattern, config_key)
    if not urls:
        raise ShardError(f"{config_key}={pattern!r} matches nothing: check the URL")
    sizes = remote.sizes(urls)
    if index is None:
        return [walked_record(url, staging, size) for url, size in zip(urls, sizes, strict=True)], None
    records = []
    for url, size in zip(urls, sizes, strict=True):
        record = index.records.get(Path(url).name)
        if record is None or record.bytes != size:
            raise ShardError(f"{url} ({size} bytes) is not the shard that {folder}/{NAME} lists: upload both again")
        records.append(replace(record, path=url))
    return records, index.class_names


def walked_record(path: str, staging: Staging | None = None, size: int = 0) -> ShardRecord:
    """Walk a shard; stage it first if it is remote."""
    with staging.open(path, size) if staging else open_or_explain(path) as file:
        return ShardRecord.walk(file, path)
