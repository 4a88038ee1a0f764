"""The files of the reference cache: what is written is read back, and what is damaged is said."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cwdpo import reference_store
from trl_cwdpo.reference_store import ReferenceCacheError, ReferenceStore, ReferenceTable

INGREDIENTS = {"weights": "abc", "max_length": 512}


def keys_of(*names: bytes) -> np.ndarray:
    return np.stack([np.frombuffer(name.ljust(16, b"\0"), dtype=np.uint8) for name in names])


@pytest.fixture
def store(tmp_path):
    store = ReferenceStore(tmp_path / "cache", INGREDIENTS)
    store.create({"model": "tiny"})
    return store


# Keys over two byte values, one of them zero: many share beginnings and endings
@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 7]), min_size=16, max_size=16), max_size=40), st.data())
def test_lookup_is_that_of_a_dictionary(keys, data):
    expected = {}
    for number, key in enumerate(keys):
        expected.setdefault(bytes(key), float(number))
    array = np.array(keys, dtype=np.uint8).reshape(-1, 16)
    cut = data.draw(st.integers(0, len(keys)))
    logps = np.arange(len(keys), dtype=np.float32)
    table = ReferenceTable.of([(array[:cut], logps[:cut])]).with_parts([(array[cut:], logps[cut:])])
    assert len(table) == len(expected)
    wanted = [*map(bytes, keys), bytes([1] * 16), bytes([0] * 15 + [1])]
    found = table.lookup(np.array([list(key) for key in wanted], dtype=np.uint8).reshape(-1, 16))
    assert [None if np.isnan(value) else value for value in found] == [expected.get(key) for key in wanted]


def test_what_is_written_is_read_back_bit_for_bit(store):
    logps = np.array([-1.5, -0.1, np.float32(1) / 3], dtype=np.float32)
    store.write_part("b", keys_of(b"x", b"y"), logps[:2])
    store.write_part("a", keys_of(b"z"), logps[2:])
    table = ReferenceStore(store.root, INGREDIENTS).load()
    assert table.lookup(keys_of(b"x", b"y", b"z", b"w"))[:3].tolist() == logps.tolist()
    assert np.isnan(table.lookup(keys_of(b"w"))).all()
    # A part is replaced as a whole
    store.write_part("a", keys_of(b"w"), logps[:1])
    assert np.isnan(store.load().lookup(keys_of(b"z"))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_no_reference(store, bad):
    store.write_part("a", keys_of(b"x", b"y"), np.array([-1.0, bad], dtype=np.float32))
    message = r"a\.safetensors is damaged: 1 of its 2 log-probabilities are not finite\. Delete this file"
    with pytest.raises(ReferenceCacheError, match=message):
        store.load()


def test_a_killed_write_leaves_the_old_file(store, monkeypatch):
    store.write_part("a", keys_of(b"x"), np.array([-1.0], dtype=np.float32))
    monkeypatch.setattr(reference_store.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(ReferenceCacheError, match="no space left"):
        store.write_part("a", keys_of(b"y"), np.array([-2.0], dtype=np.float32))
    assert store.load().lookup(keys_of(b"x", b"y"))[0] == -1.0
    assert not list(store.folder.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_part_is_named(store, tmp_path, damage):
    store.write_part("part", keys_of(b"x", b"y"), np.array([-1.0, -2.0], dtype=np.float32))
    path = store.folder / "part.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "foreign":
        other = ReferenceStore(store.root, {"weights": "other"})
        other.create({})
        path.rename(other.folder / path.name)
        store, path = other, other.folder / path.name
    elif damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-8] if damage == "cut" else b"")
    with pytest.raises(ReferenceCacheError, match=r"part\.safetensors is damaged.*Delete this file"):
        store.load()


def test_a_damaged_manifest_is_named(store):
    (store.folder / "manifest.json").write_text("{")
    with pytest.raises(ReferenceCacheError, match=r"manifest\.json is damaged"):
        ReferenceStore(store.root, {"weights": "other"}).changes()


def test_changes_are_those_to_the_most_similar_subfolder(store):
    ReferenceStore(store.root, {"weights": "def", "max_length": 64}).create({})
    new = ReferenceStore(store.root, {"weights": "abc", "max_length": 1024})
    assert not new.exists()
    assert new.changes() == ["max_length: 512 → 1024"]
    assert store.exists()
    assert ReferenceStore(store.root / "elsewhere", INGREDIENTS).changes() == []


def test_manifest_says_what_it_is_of(store):
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["ingredients"].items() >= INGREDIENTS.items()
    assert manifest["about"]["model"] == "tiny"


def test_complete_datasets(store, monkeypatch):
    assert store.complete_datasets() == {}
    assert store.add_complete_dataset("f1", 10)
    assert store.add_complete_dataset("f2", 20)
    assert store.complete_datasets() == {"f1": 10, "f2": 20}
    monkeypatch.setattr(reference_store, "_write", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert not store.add_complete_dataset("f3", 30)


def test_the_lock_is_exclusive(store):
    with store.lock():
        other = ReferenceStore(store.root, INGREDIENTS).lock()
        with pytest.raises(TimeoutError):
            other.acquire(timeout=0.05)
    other.acquire(timeout=0.05)
    other.release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReferenceCacheError, match=r"cannot be written .*choose another folder"):
        ReferenceStore(tmp_path / "file", INGREDIENTS).create({})
