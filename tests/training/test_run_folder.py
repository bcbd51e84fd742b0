"""Run folders: nothing is overwritten, other options are not resumed, two writers do not meet."""

import sys
from pathlib import Path

import pytest

from rfkernels.training.run_folder import RunFolder, read_config

DESCRIPTION = {
    "kind": "train",
    "model": {"class": "mine.Net"},
    "sample_shape": [2],
    "config": {"steps": 3, "log_every": 1},
}


def begin(folder, description=DESCRIPTION, resume=False):
    run = RunFolder(folder, description, resume=resume)
    run.close()
    return run


def test_a_run_is_never_overwritten(tmp_path):
    begin(tmp_path / "a")
    before = (tmp_path / "a" / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a run already.*resume=True"):
        begin(tmp_path / "a")
    assert (tmp_path / "a" / "config.json").read_bytes() == before
    assert begin(tmp_path / "a", resume=True).resumed


@pytest.mark.parametrize("resume", [False, True])
def test_other_folders_are_left_alone(tmp_path, resume):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and holds no run"):
        begin(tmp_path, resume=resume)
    with pytest.raises(FileExistsError, match="is a file"):
        begin(tmp_path / "letter.txt", resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_resuming_nothing_begins(tmp_path):
    assert not begin(tmp_path / "a" / "b", resume=True).resumed
    # A process that was killed before config.json was whole leaves hidden files only.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".lock").touch()
    (tmp_path / "c" / ".config.json.1.tmp").write_text("{")
    assert not begin(tmp_path / "c").resumed


def test_other_options_are_not_resumed(tmp_path):
    begin(tmp_path / "a")
    other = {**DESCRIPTION, "config": {"steps": 4, "log_every": 1}}
    with pytest.raises(ValueError, match=r"config\.steps is 3 in the run and 4 now"):
        begin(tmp_path / "a", other, resume=True)
    missing = {**DESCRIPTION, "config": {"log_every": 1}}
    with pytest.raises(ValueError, match=r"config\.steps is 3 in the run and None now"):
        begin(tmp_path / "a", missing, resume=True)
    # How often something is logged does not change the weights.
    begin(tmp_path / "a", {**DESCRIPTION, "config": {"steps": 3, "log_every": 9}}, resume=True)


def test_what_json_turns_into_lists_is_no_other_option(tmp_path):
    description = {**DESCRIPTION, "model": {"name": "x", "options": {"blocks": (8, 16)}}}
    begin(tmp_path / "a", description)
    assert begin(tmp_path / "a", description, resume=True).resumed


def test_config_of_another_format_is_refused(tmp_path):
    begin(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="must be of format 1; got 99"):
        read_config(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"format": 1, "kind": "train"}')
    with pytest.raises(ValueError, match="must say config, model, sample_shape; it does not"):
        read_config(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_config(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked there")
def test_second_writer_is_refused(tmp_path):
    run = RunFolder(tmp_path / "a", DESCRIPTION, resume=False)
    try:
        with pytest.raises(BlockingIOError, match="another process is writing"):
            begin(tmp_path / "a", resume=True)
    finally:
        run.close()
    begin(tmp_path / "a", resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a place where nobody may write")
def test_unwritable_place_is_named():
    with pytest.raises(OSError, match="run: cannot write to /proc/rfkernels-run"):
        begin("/proc/rfkernels-run")
    assert not Path("/proc/rfkernels-run").exists()
