"""The rules of the source: imports, circles, sizes and names. Each rule also finds planted faults."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import architecture
from tests.support.architecture import PACKAGES
from tests.support.helpers import ROOT

Rule = Callable[[Path], list[str]]
RULES = (
    architecture.wrong_imports,
    architecture.wrong_libraries,
    architecture.upward_imports,
    architecture.unknown_parts,
    architecture.circles,
    architecture.loose_modules,
    architecture.too_long,
    architecture.old_names,
    architecture.classes_of_one_name,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    assert {path.relative_to(ROOT).parts[0] for path in architecture.sources(ROOT)} == {*PACKAGES, "main.py"}
    assert rule(ROOT) == []


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the source, so that tests can plant faults."""
    root = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", root)
    (root / "tests").mkdir()
    return root


LONG_FUNCTION = "def f():\n" + "    print()\n" * 75
FAULTS = [
    # packages
    ("wrong_imports", "callbacks/measures/new.py", "from main import main", "imports main.main"),
    ("wrong_imports", "callbacks/measures/new.py", "import main", "imports main"),
    ("wrong_imports", "callbacks/measures/new.py", "from lightning_modules import base", "imports lightning_modules"),
    ("wrong_imports", "lightning_modules/new.py", "def f():\n    from main import main", "imports main.main"),
    ("wrong_imports", "lightning_modules/new.py", "from callbacks import latents", "imports callbacks.latents"),
    ("wrong_imports", "datamodules/new.py", "import maetok.networks", "imports maetok.networks"),
    ("wrong_imports", "datamodules/new.py", "from maetok import Tokenizer", "imports maetok.Tokenizer"),
    ("wrong_imports", "datamodules/new.py", "def f():\n    import maetok.flow as flow", "imports maetok.flow"),
    ("wrong_imports", "datamodules/new.py", "import importlib\nimportlib.import_module('main')", "imports main"),
    ("wrong_imports", "strategies/new.py", "from tools import plan", "imports tools.plan"),
    ("wrong_imports", "benchmarks/new.py", "from tools import plan", "imports tools.plan"),
    ("wrong_imports", "tools/new.py", "import benchmarks.harness", "imports benchmarks.harness"),
    ("wrong_imports", "tools/new.py", "import tests.support.helpers", "imports tests.support.helpers"),
    ("wrong_imports", "command_line/new.py", "import maetok", "imports maetok"),
    ("wrong_imports", "maetok/flow/new.py", "from datamodules import order", "imports datamodules.order"),
    ("wrong_imports", "maetok/flow/new.py", "from .solvers import solve", "imports .solvers.solve"),
    ("wrong_libraries", "maetok/flow/new.py", "def f():\n    import lightning.pytorch", "imports lightning.pytorch"),
    ("wrong_libraries", "maetok/formats/new.py", "import timm", "imports timm"),
    # the library's layers
    ("upward_imports", "maetok/runtime/new.py", "import maetok.formats.files", "imports maetok.formats.files"),
    ("upward_imports", "maetok/flow/new.py", "from maetok.networks import SiT", "imports maetok.networks"),
    ("upward_imports", "maetok/losses/new.py", "import maetok.networks.layers.vit", "imports maetok.networks"),
    ("upward_imports", "maetok/networks/denoiser/new.py", "from maetok import flow", "imports maetok.flow"),
    ("upward_imports", "maetok/networks/denoiser/new.py", "import maetok.networks.tokenizer", "maetok.networks"),
    ("upward_imports", "maetok/networks/layers/new.py", "from maetok.networks import SiT", "imports maetok.networks"),
    ("upward_imports", "maetok/training/new.py", "def f():\n    import maetok.hub", "imports maetok.hub"),
    ("upward_imports", "maetok/metrics/new.py", "from maetok import Tokenizer", "imports maetok.Tokenizer"),
    ("unknown_parts", "maetok/plans/new.py", "", "maetok.plans.new"),
    ("unknown_parts", "maetok/networks/new.py", "", "maetok.networks.new"),
    # circles: datamodules.sharded imports datamodules.order
    ("circles", "datamodules/order.py", "import datamodules.sharded", "datamodules.order"),
    ("circles", "datamodules/order.py", "def f():\n    from datamodules import ImageShards", "datamodules.order"),
    (
        "circles",
        "datamodules/order.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from datamodules.sharded import ShardedData",
        "datamodules.order, datamodules.sharded",
    ),
    # places and sizes
    ("loose_modules", "maetok/consolidate.py", "", "maetok has 1 loose modules, at most 0: consolidate.py"),
    ("loose_modules", "maetok/notes.txt", "", "maetok/notes.txt"),
    ("loose_modules", "callbacks/new.py", "", "callbacks has 4 loose modules, at most 3"),
    ("too_long", "tools/new.py", "\n" * 301, "tools/new.py has 301 lines, at most 300"),
    ("too_long", "tools/new.py", LONG_FUNCTION, "f has 76 lines, at most 75"),
    ("too_long", "tools/new.py", "import sys\nsys.path.append('.')", "tools/new.py changes sys.path"),
    ("too_long", "main.py", "\n" * 71, "lines, at most 70"),
    # names
    ("old_names", "maetok/flow/new.py", "def noise(generator): pass", "new.py:1 has the old name generator"),
    ("old_names", "maetok/flow/new.py", "def f(rng):\n    return torch.rand(3, generator=rng)", None),
    ("old_names", "maetok/flow/new.py", "class C:\n    generator: int = 1", "has the old name generator"),
    ("old_names", "maetok/flow/new.py", "f(self.generator)", "has the old name generator"),
    ("old_names", "maetok/flow/new.py", "attended = f(tokens)", "has the old name attended"),
    ("old_names", "maetok/flow/new.py", "f(attended=mask)", "has the old name attended"),
    ("old_names", "maetok/flow/new.py", "tokenizer.bottlenecked(images)", "has the old name bottlenecked"),
    ("old_names", "maetok/flow/new.py", "objective.plays(3)", "has the old name plays"),
    ("old_names", "lightning_modules/new.py", "loss, others = f()", "has the old name others"),
    ("old_names", "tools/new.py", "kept, others = f()", None),
    ("old_names", "maetok/training/new.py", "def local(tensor): pass", "has the old name local"),
    ("old_names", "maetok/training/new.py", "from maetok.training.sharding import whole", "has the old name whole"),
    ("old_names", "maetok/training/new.py", "local = 3", None),
    ("old_names", "maetok/runtime/new.py", "class Frozen: pass", "has the old name Frozen"),
    ("old_names", "callbacks/pictures/new.py", "async def described(bad): pass", "has the old name described"),
    ("old_names", "tests/new.py", "from maetok.runtime.distributed import linger_at_exit", "linger_at_exit"),
    ("old_names", "tests/new.py", "f(heartbeat.NOBODY)", "has the old name NOBODY"),
    ("classes_of_one_name", "tools/new.py", "class SampleIndex: pass", "is in datamodules/sharded.py, tools/new.py"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "file", "source", "message"), FAULTS)
def test_a_planted_fault_is_found(copied_tree: Path, rule: str, file: str, source: str, message: str | None) -> None:
    """Add source to a file, or make the file, and read the message; None: this is no fault."""
    path = copied_tree / file
    before, is_new_folder = path.read_text() if path.exists() else None, not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    try:
        path.write_text(f"{before or ''}{source}")
        found = getattr(architecture, rule)(copied_tree)
    finally:
        if is_new_folder:
            shutil.rmtree(path.parent)
        elif before is None:
            path.unlink()
        else:
            path.write_text(before)
    if message is None:
        assert found == []
    else:
        assert any(message in fault for fault in found)


@pytest.mark.parametrize("name", sorted(architecture.OLD_NAMES | architecture.OLD_FUNCTIONS))
def test_each_old_name_is_refused(copied_tree: Path, name: str) -> None:
    (copied_tree / "maetok" / "flow" / "new.py").write_text(f"def {name}(): pass")
    found = architecture.old_names(copied_tree)
    (copied_tree / "maetok" / "flow" / "new.py").unlink()
    assert found == [f"maetok/flow/new.py:1 has the old name {name}"]
