"""Sources of packing: image folders and tar files; files left out are reported, impossible options refused."""

from pathlib import Path

import pytest

from datamodules.faults import TooManyFaultsError
from datamodules.index_file import IndexFile
from datamodules.pack.__main__ import main as pack
from datamodules.shards import ShardError
from tests.support.shards import encoded, image_shards, run_pack, write_shards, write_tar


class TestFolders:
    """All images of the class folders are packed, and all other files are counted."""

    def test_images_may_lie_deeper_and_nothing_is_left_out_silently(
        self, image_folder: Path, tmp_path: Path, capsys
    ) -> None:
        (image_folder / ".thumbnails").mkdir()  # would be class 0
        (image_folder / ".thumbnails" / "0.png").write_bytes(encoded())
        (image_folder / "eel" / "deep" / "er").mkdir(parents=True)
        deep = encoded(seed=77)
        (image_folder / "eel" / "deep" / "er" / "0.png").write_bytes(deep)
        (image_folder / "dog" / "notes.txt").write_text("no image")
        (image_folder / "dog" / "gone.jpg").symlink_to("nowhere")
        (image_folder / "nobody.jpg").write_bytes(encoded(form="JPEG"))
        with pytest.raises(TooManyFaultsError, match=r"2 of 12 .* \(missing_label 1, unreadable 1\)"):
            run_pack(image_folder, tmp_path / "out")
        run_pack(image_folder, tmp_path / "out", "--max-fault-rate=0.2")
        output = capsys.readouterr()
        assert "1 files in" in output.out
        assert "not images by their extension, the first: dog/notes.txt" in output.out
        assert "pack train: 100%" in output.err
        assert "10/10" in output.err
        index = image_shards(tmp_path / "out", stage=None).index("train")
        assert index.class_names == ["cat", "dog", "eel"]
        assert {index.read(number): int(index.label[number]) for number in range(len(index))}[deep] == 2
        assert sorted(index.label.tolist()) == [0] * 3 + [1] * 3 + [2] * 4

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--samples-per-shard=0", "--samples-per-shard 0 must be at least 1"),
            ("--resize=0", "--resize 0 must be at least 1"),
            ("--jobs=-1", "--jobs -1 must be at least 0"),
            ("--max-fault-rate=5", "--max-fault-rate 5.0 is a share and must lie in"),
            ("--split=a/b", "--split 'a/b' begins file names"),
        ],
    )
    def test_options_that_cannot_be_meant(self, tmp_path: Path, capsys, option: str, message: str) -> None:
        with pytest.raises(SystemExit):
            pack(["--source=digits", f"--output={tmp_path}/out", option])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestTarFiles:
    """Existing tar files are packed again with unique keys."""

    def test_samples_come_over_with_labels(self, tmp_path: Path) -> None:
        images = write_shards(tmp_path / "source", [5, 4])
        write_tar(tmp_path / "source" / "train-000002.tar", [("0001.jpg", encoded(form="JPEG")), ("0001.cls", b"7")])
        run_pack(f"{tmp_path}/source/*.tar", tmp_path / "out")
        index = image_shards(tmp_path / "out", stage=None).index("train")
        by_image = {index.read(number): int(index.label[number]) for number in range(len(index))}
        assert by_image == {data: number * 10 // 9 for number, data in enumerate(images)} | {encoded(form="JPEG"): 7}
        assert index.faults == []

    def test_class_names_are_kept_and_must_not_differ(self, image_folder: Path, tmp_path: Path) -> None:
        run_pack(image_folder, tmp_path / "first")
        run_pack(f"{tmp_path}/first/*.tar", tmp_path / "again", "--resize=8")
        assert IndexFile.read(tmp_path / "again").class_names == ["cat", "dog", "eel"]
        (image_folder / "cat").rename(image_folder / "ant")
        run_pack(image_folder, tmp_path / "second", "--split=other")
        with pytest.raises(ShardError, match="name different classes"):
            run_pack(f"{tmp_path}/*/*.tar", tmp_path / "both")

    def test_remote_tar_files_have_to_be_copied_first(self, tmp_path: Path) -> None:
        for source in ("s3://bucket/train-*.tar", "pipe:cat x.tar"):
            with pytest.raises(ShardError, match="is not a local path: copy the tar files to this machine first"):
                run_pack(source, tmp_path / "out")
