"""Do masked autoencoders have simpler latent spaces? The paper's comparison on digits: ``python -m tools.study``.

The study trains five tokenizers of one size and budget. For each, it fine-tunes the decoder on the frozen encoder,
caches the latents, trains the same small SiT on them, samples without guidance, and decodes the samples with both
decoders. Every run is a command that a user could type, in its own directory; complete runs are not repeated.
``tools.study.measures`` measures and ``tools.study.report`` writes the document; ``tools.study.mixtures`` adds a toy
problem with a known solution.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """Describes a kind of tokenizer.

    Args:
        title: heads the columns of tables.
        training: name of its training config under ``configs/study``.
        tokenizer: name of its tokenizer config under ``configs/study``, which every command reads.
        baselines: variants to compare it with.
    """

    title: str
    training: str
    tokenizer: str = "plain"
    baselines: tuple[str, ...] = ("ae", "kl_vae")

    @property
    def is_masked(self) -> bool:
        """Whether its encoder trains with masks; its decoder is then fine-tuned with masks too."""
        return self.training.startswith("mask")


VARIANTS = {
    "ae": Variant("AE", "ae"),
    "kl_vae": Variant("KL-VAE", "ae", "variational"),
    "mask_pixel": Variant("AE + mask (pixels)", "mask_pixel"),
    "mask_hog": Variant("AE + mask + HOG", "mask_hog"),
    "mask_efficientnet": Variant("AE + mask + EfficientNet", "mask_efficientnet"),
    "mask_hog_drop": Variant("AE + mask + HOG, dropped", "mask_hog", "plain_drop", ("mask_hog",)),
}
STUDIED = [name for name in VARIANTS if name != "mask_hog_drop"]
"""Variants that are trained by default; the paper's comparison does not include dropping."""


PROFILES = {"quick": 1, "full": 3}
"""Number of seeds; the full study continues the quick one."""
TOKENIZER_STEPS, DECODER_STEPS, DIFFUSION_STEPS = 1000, 500, 1250
VALIDATE_DIFFUSION_EVERY = 250
SAMPLES = 1000


@dataclass(frozen=True)
class Run:
    """A command of the suite and the directory that it fills."""

    folder: Path
    arguments: tuple[str, ...]

    @property
    def done(self) -> Path:
        """File that exists once the command has succeeded."""
        return self.folder / "done"

    def execute(self, threads: int) -> None:
        """Run the command unless it has already succeeded.

        Raises:
            RuntimeError: if the command fails; the message ends with its last output.
        """
        if self.done.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "main.py", *self.arguments, f"--trainer.default_root_dir={self.folder}"]
        started = time.monotonic()
        with (self.folder / "output.txt").open("a") as output:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            code = subprocess.run(command, check=False, stdout=output, stderr=output, env=environment).returncode
        if code:
            tail = (self.folder / "output.txt").read_text()[-2000:]
            raise RuntimeError(f"{' '.join(command)} failed with exit code {code}:\n{tail}")
        minutes = (time.monotonic() - started) / 60
        self.done.write_text(f"{minutes:.2f} minutes\n")
        print(f"{self.folder}: {minutes:.1f} minutes", flush=True)


@dataclass(frozen=True)
class Cell:
    """A tokenizer of the study: a variant and a seed."""

    root: Path
    variant: str
    seed: int

    @property
    def folder(self) -> Path:
        """Folder of its runs."""
        return self.root / self.variant / f"seed{self.seed}"

    def runs(self) -> Iterator[Run]:
        """Yield all commands in order."""
        folder = self.folder
        tokenizer, decoder = (f"--model.init_args.init_from.path={folder / name}" for name in ("tokenizer", "decoder"))
        yield self.run("fit", "tokenizer", TOKENIZER_STEPS, *self.configs("tokenizer", VARIANTS[self.variant].training))
        unmasked = () if VARIANTS[self.variant].is_masked else ("--model.init_args.mask_ratio=0.0",)
        yield self.run("fit", "decoder", DECODER_STEPS, tokenizer, *unmasked)
        cache = folder / "latents" / "cache"
        yield self.run("predict", "latents", None, tokenizer, f"--trainer.callbacks.output={cache}")
        yield self.run("fit", "sit", DIFFUSION_STEPS, decoder, f"--data.init_args.cache={cache}")
        for name, weights in (("samples", tokenizer), ("samples_tuned", decoder)):
            yield self.run(
                "predict",
                name,
                None,
                weights,
                f"--model.init_args.denoiser_from.path={folder / 'sit'}",
                "--model.init_args.sampling.guidance_scale=1.0",
                "--model.init_args.sampling.solver.init_args.steps=25",
                f"--data.init_args.count={SAMPLES}",
                "--trainer.callbacks.png=false",
                f"--trainer.callbacks.output={folder / name / 'images'}",
            )

    def configs(self, *names: str) -> tuple[str, ...]:
        """Return the command-line arguments for configs of the study."""
        return tuple(f"--config=configs/study/{name}.yaml" for name in names)

    def run(self, subcommand: str, name: str, steps: int | None, *arguments: str) -> Run:
        """Return the command of one stage, on top of the experiment for digits."""
        configs = [argument for argument in arguments if argument.startswith("--config")]
        others = [argument for argument in arguments if argument not in configs]
        if name in ("sit", "samples", "samples_tuned"):
            configs += self.configs("sit")
        if steps is not None:
            others += [f"--trainer.max_steps={steps}", "--ckpt_path=last"]
            every = VALIDATE_DIFFUSION_EVERY if name == "sit" else steps
            others += [f"--trainer.val_check_interval={every}"]
        experiment = f"--config=configs/experiment/digits_{name.removesuffix('_tuned')}.yaml"
        configs = [experiment, *configs, *self.configs(VARIANTS[self.variant].tokenizer)]
        others += [f"--seed_everything={self.seed}"]
        if name in ("tokenizer", "decoder", "latents"):
            others += ["--data.init_args.loading.num_workers=0"]  # the other tokenizers keep all cores busy
        return Run(self.folder / name, (subcommand, *configs, *others))
