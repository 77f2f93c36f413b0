"""A callback from another file is one config line: it measures through the task's methods and is logged."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.extensions.callback import LatentSize
from tests.support.extended_runs import NO_TARGETS, train


def test_it_measures_through_the_methods_of_a_task(tmp_path: Path, digits_root: Path) -> None:
    cli = train(tmp_path, digits_root, "--trainer.callbacks+=tests.extensions.callback.LatentSize", *NO_TARGETS)
    assert any(isinstance(callback, LatentSize) for callback in cli.trainer.callbacks)
    total, count = 0.0, 0
    for batch in islice(cli.datamodule.val_dataloader(), cli.trainer.num_val_batches[0]):
        images = cli.datamodule.on_after_batch_transfer(batch, 0)["images"][batch["valid"]]
        latents = cli.model.encode(images).double()
        total, count = total + latents.square().sum().item(), count + latents.numel()
    assert count == 2 * 16 * cli.model.model.tokenizer.latent_tokens * cli.model.model.tokenizer.latent_channels
    expected = torch.tensor(total / count).sqrt().item()
    assert cli.trainer.callback_metrics["validation/latent_size"].item() == pytest.approx(expected, rel=1e-5)
