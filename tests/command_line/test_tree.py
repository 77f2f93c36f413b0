"""Test that the merged tree of a command follows jsonargparse's rules."""

from pathlib import Path

from command_line.tree import merge, read_tree, settings

SUBCOMMANDS = {"fit", "predict"}


def tree_of(*arguments: str) -> dict:
    return read_tree(["fit", *arguments], SUBCOMMANDS).values


def test_flags_in_all_their_forms() -> None:
    arguments = [
        "fit",
        "--a.b=1",
        "--a.c",
        "x=y",
        "--print_config",
        "--d+",
        "-3",
        "-c",
        "f.yaml",
        "--config=g.yaml",
        "--e",
    ]
    assert list(settings(arguments)) == [
        (1, "a.b", "1"), (3, "a.c", "x=y"), (6, "d+", "-3"), (8, "config", "f.yaml"), (9, "config", "g.yaml")
    ]  # fmt: skip


def test_merging() -> None:
    tree = {"a": {"b": 1, "c": [1]}, "m": {"class_path": "A", "init_args": {"x": 1}}, "n": "B", "l": [1]}
    merge(tree, {"a": {"b": 2, "c": [2]}, "m": "C", "n": {"init_args": {"y": 2}}, "l+": [2], "k+": 3})
    assert tree == {
        "a": {"b": 2, "c": [2]},
        "m": {"class_path": "C", "init_args": {"x": 1}},
        "n": {"class_path": "B", "init_args": {"y": 2}},
        "l": [1, 2],
        "k": [3],
    }


def test_flags_reach_arguments_of_classes_and_leave_lists_alone() -> None:
    model = "--model={class_path: A, init_args: {x: 1, y: [1]}}"
    assert tree_of(model, "--model.x=2", "--model.init_args.z.w=3", "--model.y.q=4") == {
        "model": {"class_path": "A", "init_args": {"x": 2, "y": [1], "z": {"w": 3}}}
    }
    assert tree_of("--model=A", "--model.x=2") == {"model": {"class_path": "A", "init_args": {"x": 2}}}


def test_files_sections_and_yaml_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.yaml").write_text("b: c.yaml\nd: none.yaml")
    (tmp_path / "parts" / "c.yaml").write_text("[1, 2]")
    (tmp_path / "x.yaml").write_text("a: parts/a.yaml")
    expected = {"a": {"b": [1, 2], "d": "none.yaml"}}
    assert tree_of(f"--config={tmp_path}/x.yaml") == expected
    assert tree_of(f"--a={tmp_path}/parts/a.yaml") == expected
    assert tree_of("--config={a: {b: 1}, z: '" + "long " * 1000 + "'}")["a"] == {"b": 1}
    assert tree_of("--config=nowhere.yaml", "--model.help=A", "--print_config=skip_null") == {}
    (tmp_path / "sections.yaml").write_text("fit: {a: 1}\npredict: {a: 2}")
    assert read_tree([f"--config={tmp_path}/sections.yaml", "predict", "--b=3"], SUBCOMMANDS).values == {"a": 2, "b": 3}
