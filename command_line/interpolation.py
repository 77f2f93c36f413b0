"""``${...}`` in configs, resolved once by OmegaConf on what all files and flags say together.

``${shared.image_size}`` is the value of a key, named from the top of the config without the subcommand;
``${oc.env:NAME,default}`` is an environment variable. https://omegaconf.readthedocs.io describes the grammar.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from command_line.tree import Tree

MARK = "${"


@dataclass
class Shared:
    """Values that several parts of an experiment use; configs refer to them as ``${shared.NAME}``.

    Args:
        name: name of the experiment, from which others of its runs are named.
        image_size: height and width of images in pixels, of the data and of the tokenizer.
        num_classes: number of labels, of the data and of the denoiser.
        data_root: folder of the packed images.
        cache: folder of the latent cache.
        tokenizer_run: run directory of stage 1.
        decoder_run: run directory of stage 2.
        denoiser_run: run directory of stage 3.
        max_steps: length of training in steps.
        discriminator_start: step at which adversarial training begins.
    """

    name: str | None = None
    image_size: int | None = None
    num_classes: int | None = None
    data_root: str | None = None
    cache: str | None = None
    tokenizer_run: str | None = None
    decoder_run: str | None = None
    denoiser_run: str | None = None
    max_steps: int | None = None
    discriminator_start: int | None = None


class InterpolationError(ValueError):
    """An interpolation that cannot be resolved; the message names file, key and text."""


class Interpolation:
    """Resolves texts of a command against its merged tree.

    A text that cannot be resolved is dropped if a later file or flag replaces its value.

    Raises:
        InterpolationError: if a text of a file or flag cannot be resolved, or a flag sets a shared value that no text
            refers to.
    """

    def __init__(self, tree: Tree, flags: list[str]) -> None:
        self.tree = tree
        self._root: Any = None
        texts = [text for text in tree.texts if MARK in text[2]]
        self.replaced: set[str] = set()
        for where, key, text in texts:
            checked(check_grammar, where, key, text)
        for where, key, text in texts:
            try:
                checked(self._resolved, where, key, text)
            except InterpolationError:
                if tree.has(key, text):
                    raise
                self.replaced.add(text)
        for flag in flags:
            if flag.startswith("shared.") and not any(flag in text for _, _, text in texts):
                raise InterpolationError(
                    f"--{flag} changes nothing: no config refers to ${{{flag}}} (a saved config.yaml holds the values "
                    "instead); set the arguments themselves"
                )

    def __call__(self, content: Any) -> Any:
        """Return the content of a file or a text with all its interpolations resolved."""
        if isinstance(content, dict):
            return {key: self(value) for key, value in content.items() if not self._is_replaced(value)}
        if isinstance(content, list):
            return [self(value) for value in content]
        if isinstance(content, str) and MARK in content:
            return checked(self._resolved, "a config or flag", "some key", content)
        return content

    def _is_replaced(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.replaced

    def _resolved(self, text: str) -> Any:
        from omegaconf import OmegaConf  # slow to import, and --help needs none of it

        if self._root is None:
            self._root = OmegaConf.create(self.tree.values, flags={"allow_objects": True})
        self._root["__text__"] = text
        value = self._root["__text__"]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_grammar(text: str) -> None:
    """Raise OmegaConf's error if a text is no interpolation; one such text would hide the others' values."""
    from omegaconf import OmegaConf

    OmegaConf.create({"text": text})


def checked(step: Callable[[str], Any], where: str, key: str, text: str) -> Any:
    """Return what a step makes of a text; its error says where the text stands."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        return step(text)
    except (OmegaConfBaseException, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InterpolationError(
            f"{where}: {key}: {text}: {reason}. An interpolation names a key of the config from the top, as in "
            "${shared.image_size}, or an environment variable, as in ${oc.env:NAME,default}"
        ) from error
