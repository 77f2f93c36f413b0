"""Write WebDataset shards and their index: ``python -m datamodules.pack --source FOLDER|digits|TARS --output FOLDER``.

Shards are written in parallel into a hidden folder, each under a temporary name until it is complete, and moved to
their final place at the end. Repeat the command to resume a killed packing. Equal input gives equal bytes.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from datamodules.faults import check_fault_rate, describe_counts
from datamodules.index_file import NAME, IndexFile, locked
from datamodules.pack.shard import ShardJobs, finished_shards
from datamodules.pack.sources import Source, shuffled
from datamodules.shards import Fault, ShardError, ShardRecord
from maetok.formats.files import publish, write_text


@dataclass(frozen=True)
class PackOptions:
    """Options that decide the bytes of the shards.

    Args:
        samples_per_shard: the last shard may hold fewer.
        resize: shrink images whose short side is longer than this to it (JPEG quality 95, other formats as PNG); other
            images are copied byte for byte. None copies all.
        verify: decode every image once to find damaged ones.
        max_fault_rate: share of broken samples above which packing fails; fewer are left out and listed.
        seed: seed of the order in which the samples are stored.
        shuffle: store the samples in a random order.
    """

    samples_per_shard: int = 1000
    resize: int | None = None
    verify: bool = True
    max_fault_rate: float = 0.001
    seed: int = 0
    shuffle: bool = True


def pack_split(source: Source, folder: Path, split: str, options: PackOptions, jobs: int, overwrite: bool) -> None:
    """Write ``<split>-000000.tar`` and so on, and list them in ``index.json``.

    Args:
        source: samples to pack.
        folder: where to write; created if missing.
        split: first part of the file names.
        options: what decides the bytes.
        jobs: worker processes; 0 packs in this process.
        overwrite: replace shards of this split that were packed from other input or options.

    Raises:
        ShardError: if the folder holds other shards of this split or other classes, or too many samples are broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = shuffled(source.samples, options.seed) if options.shuffle else source.samples
    groups = [samples[i : i + options.samples_per_shard] for i in range(0, len(samples), options.samples_per_shard)]
    files = [f"{split}-{number:06d}.tar" for number in range(len(groups))]
    fingerprint = source_fingerprint(samples, options)
    partial = folder / f".{split}.partial"
    partial.mkdir(exist_ok=True)
    with locked(partial):  # worker processes that outlive a killed parent for a moment hold it as well
        if already_packed(folder, split, fingerprint, partial, overwrite):
            return
        check_class_names(folder, split, source.class_names)
        prepare(partial, fingerprint)
        todo = ShardJobs(groups, files, str(partial), options.resize, options.verify)
        faults = source.faults + write_shards(todo, partial, split, jobs)
        total = len(samples) + len(source.faults)
        report_faults(folder, split, faults)
        check_fault_rate(faults, total, options.max_fault_rate, f"packing {split} into {folder}")
        publish_split(folder, split, partial, files, source.class_names, fingerprint, faults)


def source_fingerprint(samples: list, options: PackOptions) -> str:
    """Return a hash of everything that decides the bytes of the shards: names, labels, sizes, order and options."""
    digest = hashlib.sha256(json.dumps(asdict(replace(options, max_fault_rate=0))).encode())
    for sample in samples:
        size = sample.size if sample.data is None else hashlib.sha256(sample.data).hexdigest()
        digest.update(f"{sample.name}\0{sample.extension}\0{sample.label}\0{size}\n".encode())
    return digest.hexdigest()[:16]


def already_packed(folder: Path, split: str, fingerprint: str, partial: Path, overwrite: bool) -> bool:
    """Return whether the folder holds exactly these shards; finish a packing that was killed while being published.

    Raises:
        ShardError: if it holds other shards of this split and ``overwrite`` is False.
    """
    index = IndexFile.read(folder) or IndexFile()
    present = of_split(split, (path.name for path in folder.glob("*.tar")))
    packed = index.packings.get(split)
    if packed and packed["fingerprint"] == fingerprint:
        expected = of_split(split, index.records)
        for name in expected:
            if (partial / name).is_file():
                publish(partial / name, folder / name)
        if all((folder / name).is_file() for name in expected):
            shutil.rmtree(partial, ignore_errors=True)
            print(f"{folder} already holds {split}: {len(expected)} shards; nothing to do")
            return True
    elif (packed or present) and not overwrite:
        with suppress(OSError):  # not empty: a killed packing can resume from it
            partial.rmdir()
        raise ShardError(
            f"--output {folder} holds shards {split}-*.tar of other input or options: give another --output "
            "or --split, or --overwrite to replace them"
        )
    return False


def of_split(split: str, names: Iterable[str]) -> set[str]:
    """Return the file names that are shards of a split."""
    return {name for name in names if re.fullmatch(rf"{re.escape(split)}-\d{{6,}}\.tar", name)}


def check_class_names(folder: Path, split: str, class_names: list[str] | None) -> None:
    """Raise ShardError if another split in the same folder was packed with other classes."""
    index = IndexFile.read(folder)
    if index and set(index.packings) - {split} and index.class_names != class_names:
        raise ShardError(
            f"{folder / NAME} lists other classes ({len(index.class_names or [])}) than this source "
            f"({len(class_names or [])}), so labels would not mean the same: complete the class folders, or write to "
            "another --output"
        )


def prepare(partial: Path, fingerprint: str) -> None:
    """Empty the hidden folder if a packing of other input or options left files in it."""
    note = partial / "fingerprint"
    if not (note.is_file() and note.read_text() == fingerprint):
        for path in partial.iterdir():
            path.unlink()
        write_text(note, fingerprint)


def write_shards(todo: ShardJobs, partial: Path, split: str, jobs: int) -> list[Fault]:
    """Write the shards that are not complete; return the broken samples of all shards."""
    from torch.utils.data import DataLoader

    done = finished_shards(partial, todo.files)
    rest = [number for number, name in enumerate(todo.files) if name not in done]
    loader = DataLoader(todo, batch_size=None, sampler=rest, num_workers=min(jobs, len(rest)), collate_fn=identity)  # type: ignore[arg-type]
    faults = {name: found for name, (_, found) in done.items()}
    with tqdm(total=sum(map(len, todo.groups)), desc=f"pack {split}", unit="image") as bar:
        bar.update(sum(len(todo.groups[todo.files.index(name)]) for name in done))
        for number, found in loader:
            faults[todo.files[number]] = found
            bar.update(len(todo.groups[number]))
    return [fault for name in todo.files for fault in faults[name]]


def identity(result: object) -> object:
    """Return a worker's result unchanged."""
    return result


def report_faults(folder: Path, split: str, faults: list[Fault]) -> None:
    """Write the broken samples of a split to ``<split>_faults.jsonl`` and print their number."""
    path = folder / f"{split}_faults.jsonl"
    if faults:
        write_text(path, "".join(json.dumps(fault._asdict()) + "\n" for fault in faults))
        counts = Counter(fault.reason for fault in faults)
        print(f"{len(faults)} broken samples, listed in {path}: {describe_counts(counts)}")
    else:
        path.unlink(missing_ok=True)


def publish_split(
    folder: Path,
    split: str,
    partial: Path,
    files: list[str],
    class_names: list[str] | None,
    fingerprint: str,
    faults: list[Fault],
) -> None:
    """List the complete shards in ``index.json``, then give them their names: a part never passes for the whole."""
    done = finished_shards(partial, files)
    with locked(folder):  # another split may be packed at the same time
        index = IndexFile.read(folder) or IndexFile()
        stale = of_split(split, (path.name for path in folder.glob("*.tar"))) - set(files)
        kept = {name: index.records[name] for name in index.records.keys() - of_split(split, index.records)}
        written: dict[str, ShardRecord] = {name: record for name, (record, _) in done.items()}
        counts = dict(sorted(Counter(fault.reason for fault in faults).items()))
        packings = index.packings | {split: {"fingerprint": fingerprint, "faults": counts}}
        IndexFile(class_names, packings, kept | written).write(folder)
    for name in stale:
        (folder / name).unlink()
    for name in files:
        publish(partial / name, folder / name)
    shutil.rmtree(partial)
