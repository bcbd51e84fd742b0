"""Kept files: read by whoever may read the folder, or not at all."""

import os

import pytest

from rfkernels._whole_file import read_json_kept, write_json_whole


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_others_may_read_what_one_user_wrote(tmp_path):
    beside = tmp_path / "beside"
    beside.write_text("")
    write_json_whole(tmp_path / "index.json", {"state": 1})
    assert (tmp_path / "index.json").stat().st_mode == beside.stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beside", "index.json"]


def test_only_what_was_kept_for_this_is_read(tmp_path):
    file = tmp_path / "index.json"
    assert read_json_kept(None, "state", 1) is None
    assert read_json_kept(file, "state", 1) is None
    write_json_whole(file, {"state": 1, "rows": []})
    assert read_json_kept(file, "state", 1) == {"state": 1, "rows": []}
    assert read_json_kept(file, "state", 2) is None
    file.write_text('{"state": 1')
    assert read_json_kept(file, "state", 1) is None
