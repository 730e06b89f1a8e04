"""Files that are complete, or absent."""

import pytest

from foreroute.engine.sealed_files import replacing


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    file = tmp_path / "found.json"
    for content in ("old", "new"):
        with replacing(file) as new:
            new.write_text(content)
            assert not file.exists() or file.read_text() == "old"
    with pytest.raises(KeyboardInterrupt), replacing(file) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["found.json"]
