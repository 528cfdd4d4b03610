"""Some damaged files through every reader; tests/soak/fuzz_readers.py has many more."""

from __future__ import annotations

from pathlib import Path

import fuzz_readers
import pytest

FILES = 2000


@pytest.mark.parametrize("name", fuzz_readers.available())
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    counts = fuzz_readers.run(name, FILES // len(fuzz_readers.available()), 7, tmp_path)
    lost = {kind: count for kind, count in counts.items() if kind.startswith("lost")}
    assert not lost, f"python tests/soak/fuzz_readers.py --reader {name} --seed 7 --keep FOLDER"
    assert len(counts) > 1 or name in ("demo", "simulator"), (
        "no damage got through, or none did not"
    )


def test_a_reader_that_loses_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that errors which are not documented count as losses."""
    whole = fuzz_readers.tuning

    def careless(scratch: Path) -> fuzz_readers.Reader:
        reader = whole(scratch)
        reader.read = lambda folder: exec((folder / "tuning.json").read_bytes(), {})
        return reader

    monkeypatch.setitem(fuzz_readers.READERS, "tuning", careless)
    counts = fuzz_readers.run("tuning", 50, 7, tmp_path)
    assert any(kind.startswith("lost: raised") for kind in counts)
