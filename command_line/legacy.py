"""Old names in configs: the only file that knows them. Saved configs and scripts that use them keep working."""

import re
from collections.abc import Mapping
from typing import Any

OLD_TASK_ARGUMENTS = {
    "TokenizerTraining": {"generator": "autoencoder_optimization"},
    "DecoderFinetuning": {"generator": "autoencoder_optimization"},
    "LatentDiffusion": {"generator": "optimization"},
}
"""New names of old keys in ``model.init_args``, by the class name of the task."""

OLD_MODULES = {
    "callbacks.checkpointing": "callbacks.resilience.checkpointing",
    "callbacks.continued_curve": "callbacks.resilience.continued_curve",
    "callbacks.early_signal": "callbacks.measures.early_signal",
    "callbacks.gmm_modes": "callbacks.measures.gmm_modes",
    "callbacks.heartbeat": "callbacks.resilience.heartbeat",
    "callbacks.image_metrics": "callbacks.measures.image_metrics",
    "callbacks.interpolations": "callbacks.pictures.interpolations",
    "callbacks.latent_pictures": "callbacks.pictures.latents",
    "callbacks.latent_writer": "callbacks.writers.latents",
    "callbacks.linear_probe": "callbacks.measures.linear_probe",
    "callbacks.non_finite_guard": "callbacks.resilience.non_finite_guard",
    "callbacks.progress": "callbacks.reporting.progress",
    "callbacks.reconstruction_metrics": "callbacks.measures.reconstruction_metrics",
    "callbacks.reconstruction_pictures": "callbacks.pictures.reconstructions",
    "callbacks.requeue": "callbacks.resilience.requeue",
    "callbacks.run_report": "callbacks.reporting.run_report",
    "callbacks.sample_metrics": "callbacks.measures.sample_metrics",
    "callbacks.sample_pictures": "callbacks.pictures.samples",
    "callbacks.sample_writer": "callbacks.writers.samples",
    "callbacks.throughput": "callbacks.reporting.throughput",
    "maetok.networks.bottlenecks": "maetok.networks.tokenizer.bottlenecks",
    "maetok.networks.hog": "maetok.networks.targets.hog",
    "maetok.networks.lightning_dit": "maetok.networks.denoiser.lightning_dit",
    "maetok.networks.masking": "maetok.networks.tokenizer.masking",
    "maetok.networks.sit": "maetok.networks.denoiser.sit",
    "maetok.networks.teachers": "maetok.networks.targets.teachers",
    "maetok.networks.vit": "maetok.networks.layers.vit",
}
"""New names of modules that moved and hold classes for configs; those of public packages never changed."""

CLASS_PATH = re.compile(r"([\w.]+)\.([A-Z]\w*(?:\.\w+)?)")
FLAG = re.compile(r"(--model\.(?:init_args\.)?)(\w+)(.*)", re.DOTALL)


def new_class_path(value: str) -> str:
    """Return the path of a class, or of a method of it, with the new name of its module."""
    match = CLASS_PATH.fullmatch(value)
    return f"{OLD_MODULES[match[1]]}.{match[2]}" if match and match[1] in OLD_MODULES else value


def renamed_arguments(task: Any) -> Mapping[str, str]:
    """Return new names by old ones for a task, which is named by its class or class path."""
    return OLD_TASK_ARGUMENTS.get(task.rpartition(".")[2], {}) if isinstance(task, str) else {}


def modernize(tree: Any, task: str = "", changes: set[str] | None = None) -> Any:
    """Return a tree from a YAML file with new names.

    Args:
        tree: what the file says: a config, or a fragment of one.
        task: class of the task, for files that change a ``model`` without naming its class.
        changes: receives one sentence for each kind of change.
    """
    changes = set() if changes is None else changes
    if isinstance(tree, str):
        new = new_class_path(tree)
        if new != tree:
            changes.add(f"{tree} is now {new}")
        return new
    if isinstance(tree, list):
        return [modernize(item, "", changes) for item in tree]
    if not isinstance(tree, dict):
        return tree
    new_tree = {}
    for key, value in tree.items():
        named = value.get("class_path", task) if key == "model" and isinstance(value, dict) else None
        new_tree[key] = modernize(value, task if named is None else named, changes)
    names = renamed_arguments(new_tree.get("class_path", task))
    if isinstance(arguments := new_tree.get("init_args"), dict):
        for old in names.keys() & arguments.keys():
            changes.add(f"model.init_args.{old} is now model.init_args.{names[old]}")
        new_tree["init_args"] = {names.get(key, key): value for key, value in arguments.items()}
    return new_tree


def modernize_flag(flag: str, task: str, changes: set[str]) -> str:
    """Return a flag with or without its value, or a value alone, with new names; ``changes`` as in ``modernize``."""
    if not flag.startswith("--"):
        return modernize(flag, "", changes)
    match = FLAG.fullmatch(flag)
    names = renamed_arguments(task)
    if match and match[2] in names:
        changes.add(f"{match[1]}{match[2]} is now {match[1]}{names[match[2]]}")
        flag = f"{match[1]}{names[match[2]]}{match[3]}"
    name, equals, value = flag.partition("=")
    return name + equals + modernize(value, "", changes)
