"""Stage 3: train a denoiser on latents, and sample images with it (paper section 3.3)."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_modules.base import Task
from lightning_modules.latent_moments import measured_moments, published_moments
from lightning_modules.optimization import Optimization
from lightning_modules.sampling import (
    DenoiserFrom,
    Sampling,
    check_guidance,
    check_published,
    check_sizes,
    guiding_network,
)
from maetok.checkpoints.networks import DENOISER
from maetok.checkpoints.runs import InitFrom
from maetok.flow import FlowObjective, index_noise, sample
from maetok.metrics import to_uint8
from maetok.networks import Denoiser, LatentTokenizer
from maetok.networks.denoiser.normalizer import LatentNormalizer
from maetok.runtime.pretrained import UnregisteredModule
from maetok.runtime.weights import weights_hash
from maetok.training.ema import EMA

VALIDATION_SEED = 0  # the same noise in every run


class LatentDiffusion(Task):
    """Flow matching on normalised latents, from a cache or from images through the frozen tokenizer.

    Args:
        denoiser: the network to train.
        tokenizer: encodes images and decodes samples; the class_path ``maetok.Tokenizer.from_pretrained`` loads a
            published one. Checkpoints do not contain it.
        optimization: optimisation of the denoiser; only ``fit`` needs it.
        init_from: checkpoint or run directory with the tokenizer's weights; null if the tokenizer has them already.
        denoiser_from: checkpoint or run directory with the weights of the denoiser and the statistics of its latents,
            to sample from; null for a published denoiser, or to train from the beginning.
        statistics_from: published folder or hub id with the statistics of a published denoiser's latents: the folder of
            an exported SiT, or of the tokenizer of a released SiT. Further training keeps them.
        objective: path, times and loss; linear path, uniform times and squared error if not given.
        sampling: settings for pictures, metrics and ``predict``.
        guide_from: checkpoint of an earlier run of the denoiser, or of ``guide``, that guides instead of the null
            condition (autoguidance); null for classifier-free guidance.
        guide: a smaller denoiser for ``guide_from``, or a published one; null for a copy of ``denoiser``.
        label_dropout: probability of replacing a condition by the null condition.
        ema_decays: decays of moving averages of the denoiser; validation and samples use the first.
        validation_bins: number of time bins of the validation loss.
        statistics_samples: number of training samples that give the mean and standard deviation of the latents when
            training on images; a cache has its own.
        **kwargs: arguments of :class:`Task`.

    Raises:
        ValueError: if tokenizer and denoiser do not fit, or ``ema_decays`` is empty.
    """

    trains: ClassVar = {"denoiser": DENOISER}

    def __init__(
        self,
        denoiser: Denoiser,
        tokenizer: LatentTokenizer,
        optimization: Optimization | None = None,
        init_from: InitFrom | None = None,
        denoiser_from: DenoiserFrom | None = None,
        statistics_from: str | None = None,
        objective: FlowObjective | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        guide_from: DenoiserFrom | None = None,
        guide: Denoiser | None = None,
        label_dropout: ClosedUnitInterval = 0.1,
        ema_decays: Sequence[float] = (0.9999,),
        validation_bins: PositiveInt = 10,
        statistics_samples: PositiveInt = 50_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not ema_decays:
            raise ValueError("model.init_args.ema_decays is empty: give at least one decay, such as 0.9999")
        check_sizes(tokenizer, denoiser)
        if init_from is not None:
            init_from.load(tokenizer)
        self.tokenizer = UnregisteredModule(tokenizer)
        self.normalizer = LatentNormalizer(denoiser.latent_channels)
        self.guide_from = guide_from.located() if guide_from is not None else None
        self.guide = guiding_network(denoiser, guide, self.guide_from)
        check_guidance(denoiser, sampling.guidance_scale, self.guide is not None)
        self.denoiser_from = denoiser_from.located() if denoiser_from is not None else None
        if self.denoiser_from is not None:
            self.denoiser_from.load(denoiser)
            InitFrom(self.denoiser_from.path, "normalizer.").load(self.normalizer)
        self.statistics_from = statistics_from
        if statistics_from is not None:
            self.normalizer.set_statistics(*published_moments(statistics_from, denoiser.latent_channels))
        self.denoiser = denoiser
        self.emas = nn.ModuleList(EMA(denoiser, decay) for decay in ema_decays)
        self.objective = objective if objective is not None else FlowObjective()
        self.optimization, self.sampling, self.label_dropout = optimization, sampling, label_dropout
        self.validation_bins, self.statistics_samples = validation_bins, statistics_samples

    @cached_property
    def tokenizer_hash(self) -> str:
        """Return a hash that distinguishes caches of this tokenizer from others."""
        return self.tokenizer.network.latents_hash()  # type: ignore[operator]

    def setup(self, stage: str) -> None:
        """Check that data and networks fit, and that there are weights to sample from.

        Raises:
            ValueError: if they do not fit, or weights are missing.
        """
        super().setup(stage)
        self.check_image_size(self.tokenizer.network.image_size)  # type: ignore[arg-type]
        self.check_classes(self.denoiser.num_classes)
        if stage == "predict" and self.denoiser_from is None:
            check_published(self.denoiser, self.statistics_from)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse ``--ckpt_path`` for sampling: the record of the samples would not name that checkpoint."""
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "predict":
            raise ValueError("predict takes no --ckpt_path: set model.init_args.denoiser_from.path to the checkpoint")

    def configure_model(self) -> None:
        """Recompute activations, compile and shard, as configured. The averaged denoiser is compiled too."""
        self.prepare_training(self.denoiser, self.averaged_denoiser)

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        """Return the optimizer of the denoiser; raise ValueError if it is not configured."""
        if self.optimization is None:
            raise ValueError("model.init_args.optimization is missing: set it to train the denoiser")
        optimizer, schedule = self.optimization.build(self.denoiser, self.trainer.max_steps)
        return [optimizer], [schedule]

    def on_train_start(self) -> None:
        """Set the statistics of the latents, unless a checkpoint or a published model has set them."""
        super().on_train_start()
        if self.checkpoint_step or self.statistics_from is not None:
            return
        data = self.trainer.datamodule.index("train")  # type: ignore[attr-defined]
        mean, std = (data.mean, data.std) if hasattr(data, "std") else measured_moments(self, self.statistics_samples)
        self.normalizer.set_statistics(torch.as_tensor(mean).float(), torch.as_tensor(std).float())

    def raw_latents(self, batch: dict[str, Tensor]) -> Tensor:
        """Return latents (B, L, C) of a batch of latents or of images."""
        return batch["latents"] if "latents" in batch else self.encode(batch["images"])

    def valid_condition(self, batch: dict[str, Tensor]) -> Any:
        """Return the condition of the valid samples of a batch."""
        return tree_map_only(Tensor, lambda value: value[batch["valid"]], self.denoiser.condition_of(batch))

    def training_noise(self, latents: Tensor) -> Tensor:
        """Return noise (B, L, C). It differs for every sample of a run, and no number of processes changes it."""
        first = (self.global_step * self.accumulate_grad_batches + self.micro_step) * len(latents)
        rows = torch.arange(first, first + len(latents), device=self.device)
        return index_noise(self.seed, rows * self.trainer.world_size + self.global_rank, shape=latents.shape[1:])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Train on one micro-batch."""
        rng = np.random.default_rng(self.begin_micro_step())
        latents = self.normalizer.normalize(self.raw_latents(batch))
        uniform = self.uniform(rng, len(latents), 2)
        noise = self.training_noise(latents)
        condition = self.denoiser.condition_of(batch)
        condition = self.denoiser.drop_condition(condition, uniform[:, 1], self.label_dropout)
        losses, terms = self.objective.loss(self.denoiser, latents, noise, uniform[:, 0], condition)
        loss = losses.mean()
        self.backward_micro_batch(0, loss)
        scalars: dict[str, Tensor | float] = {f"train/{name}": term for name, term in terms.items()}
        scalars["train/loss"] = loss.detach()
        if self.is_last_micro_step:
            scalars["learning_rate/denoiser"] = self.learning_rate(0)
            assert self.optimization is not None
            scalars["gradient_norm/denoiser"] = self.step_optimizer(0, self.denoiser, self.optimization.gradient_clip)
            for ema in self.emas:
                ema.update(self.denoiser, self.global_step)
        self.end_micro_step()
        self.log_scalars(scalars)

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of losses by time bin."""
        self.bin_sums = torch.zeros(2, self.validation_bins, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Sum the squared velocity errors. Each sample has one time bin and one noise, the same in every run."""
        valid = batch["valid"]
        latents, indices = self.normalizer.normalize(self.raw_latents(batch))[valid], batch["indices"][valid]
        if len(latents) == 0:
            return
        bins = indices % self.validation_bins
        noise = index_noise(VALIDATION_SEED, indices, shape=latents.shape[1:])
        times = (bins + 0.5) / self.validation_bins
        terms = self.objective.terms_at(self.averaged_denoiser, latents, noise, times, self.valid_condition(batch))
        self.bin_sums[0].index_add_(0, bins.cpu(), terms["velocity_mse"].double().cpu())
        self.bin_sums[1] += bins.cpu().bincount(minlength=self.validation_bins)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss of each bin and of all bins."""
        super().on_validation_epoch_end()
        sums = self.trainer.strategy.reduce(self.bin_sums.to(self.device), reduce_op="sum")
        for number, (total, count) in enumerate(sums.T.tolist()):
            if count:
                self.log(f"validation_loss_at/{(number + 0.5) / self.validation_bins:.3f}", total / count)
        total, count = sums.sum(1).tolist()
        self.log("validation/diffusion_loss", total / max(1.0, count), prog_bar=True)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return images (n, H, W, 3) uint8 of the n valid samples of a batch."""
        images = self.sample(self.valid_condition(batch), batch["indices"][batch["valid"]])
        return to_uint8(images).permute(0, 2, 3, 1)

    def sampling_identity(self) -> dict[str, Any]:
        """Return what samples depend on besides their conditions, for the record."""
        networks = [self.averaged_denoiser, self.normalizer, self.tokenizer.network]
        networks += [self.guide.network] if self.guide is not None else []
        return {
            "checkpoint": self.denoiser_from and self.denoiser_from.path,
            "guide": self.guide_from and self.guide_from.path,
            "weights": weights_hash("", [network.state_dict() for network in networks]),
            "precision": str(self.trainer.precision),
            "interpolant": type(self.objective.interpolant).__name__,
            **self.sampling.identity(),
        }

    @property
    def averaged_denoiser(self) -> Denoiser:
        """Return the first moving average of the denoiser."""
        network = self.emas[0].network
        assert isinstance(network, Denoiser)
        return network

    def frozen_tokenizer(self) -> LatentTokenizer:
        """Return the tokenizer on the device of this task."""
        return self.tokenizer.on(self.device)  # type: ignore[return-value]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as raw latents (B, L, C)."""
        return self.frozen_tokenizer().encode(images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode raw latents (B, L, C) to images (B, 3, H, W), about [-1, 1]."""
        return self.frozen_tokenizer().decode(latents)

    @torch.no_grad()
    def sample(self, condition: Any, indices: Tensor, guidance_scale: float | None = None) -> Tensor:
        """Return images (n, 3, H, W), about [-1, 1]. Each depends on its condition, index and the sampling seed only.

        Args:
            condition: of n samples, as the denoiser takes it: labels (n,) int64. A denoiser without labels ignores it.
            indices: (n,) int64, numbers of the samples, which decide their noise.
            guidance_scale: ``sampling.guidance_scale`` if not given.
        """
        sampling, shape = self.sampling, (self.denoiser.latent_tokens, self.denoiser.latent_channels)
        normalized = sample(
            self.averaged_denoiser,
            condition,
            index_noise(sampling.seed, indices, shape=shape),
            solver=sampling.solver_or_default,
            guidance_scale=sampling.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_interval=sampling.guidance_interval,
            guide=self.guide,
            interpolant=self.objective.interpolant,
            step_noise=lambda step: index_noise(sampling.seed, indices, step, shape),
        )
        return self.decode(self.normalizer.denormalize(normalized))
