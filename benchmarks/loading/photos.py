"""Make real photos without a download: ``python -m benchmarks.loading.photos --output FOLDER --count 2000``.

They are crops of the wallpapers of Debian packages, one class for each photograph, in the sizes and JPEG settings of
web images. Good for speed; not for quality, since all images of a class show the same thing.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

FOLDERS = (Path("/usr/share/wallpapers"), Path("/usr/share/backgrounds"))
INSTALL = (
    "apt-get install --no-install-recommends plasma-workspace-wallpapers mate-backgrounds ukui-wallpapers "
    "lomiri-wallpapers-16.04 lomiri-wallpapers-20.04"
)
# drawings and renderings that their statistics do not give away
DRAWINGS = ("Autumn", "Elephants", "Honeywave", "SafeLanding", "Shell", "Volna", "analogpattern", "string")
SHORT_SIDES = (520, 700, 1000)
"""Short sides that a wallpaper is scaled down to before it is cropped."""


def photographs(folders: tuple[Path, ...] = FOLDERS) -> dict[str, Path]:
    """Return the largest version of each photograph among the installed wallpapers, by name.

    Raises:
        FileNotFoundError: if there are none; names the packages.
    """
    largest: dict[str, tuple[int, Path]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.jpg")):
            # KDE has one folder for each picture, the others one file
            name = path.relative_to(folder).parts[0] if "contents" in path.parts else path.stem
            name = re.sub(r"_\d+x\d+$", "", name)
            if path.is_symlink() or name.startswith(DRAWINGS) or path.stem == "screenshot":
                continue
            with Image.open(path) as image:
                width, height = image.size
            if min(width, height) >= SHORT_SIDES[-1] and width * height > largest.get(name, (0, path))[0]:
                largest[name] = (width * height, path)
    found = {name: path for name, (_, path) in sorted(largest.items()) if is_photograph(path)}
    if not found:
        raise FileNotFoundError(f"no photographs in {', '.join(map(str, folders))}. Install some with: {INSTALL}")
    return found


def is_photograph(path: Path) -> bool:
    """Return whether a picture is a photograph: drawings and gradients have many neighbours of equal brightness."""
    grey = np.asarray(scaled(path, SHORT_SIDES[0]).convert("L"), dtype=np.float32)
    return float((np.abs(np.diff(grey, axis=1)) < 1).mean()) < 0.5 and float(grey.std()) > 10


def scaled(path: Path, short_side: int) -> Image.Image:
    """Return the picture scaled to a short side; the JPEG decoder does most of the scaling."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * short_side, 2 * short_side))
        picture = image.convert("RGB")
    factor = short_side / min(picture.size)
    width, height = (round(side * factor) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def crops(path: Path, count: int, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Yield random windows of a picture with a short side of 256 to 500 pixels and an aspect ratio of up to 4:3."""
    versions = [scaled(path, short_side) for short_side in SHORT_SIDES]
    for number in range(count):
        version = versions[number % len(versions)]
        short = int(rng.integers(256, 501))
        long = min(round(short * rng.uniform(1.0, 4 / 3)), *version.size)
        width, height = (long, short) if rng.random() < 0.6 else (short, long)
        left = int(rng.integers(version.width - width + 1))
        top = int(rng.integers(version.height - height + 1))
        yield version.crop((left, top, left + width, top + height))


def write_photos(output: Path, count: int, seed: int = 0) -> None:
    """Write ``output/<photograph>/<number>.jpg``, equal files at every call."""
    sources = photographs()
    each = np.full(len(sources), count // len(sources)) + (np.arange(len(sources)) < count % len(sources))
    number = 0
    for (name, path), of_class in zip(tqdm(sources.items(), unit="class"), each, strict=True):
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        for image in crops(path, int(of_class), np.random.Generator(np.random.PCG64([seed, number]))):
            image.save(
                folder / f"{number:06d}.jpg",
                quality=(90, 95, 96)[number % 3],
                subsampling=("4:2:0", "4:4:4")[number // 3 % 2],
            )
            number += 1


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading.photos", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder for the image folders")
    parser.add_argument("--count", default=2000, type=int, help="number of photos")
    options = parser.parse_args(args)
    write_photos(options.output, options.count)


if __name__ == "__main__":
    main()
