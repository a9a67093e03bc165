"""dataset.json: what makes two datasets the same, and what is said when they are not."""

import json

import pytest

from shards.dataset import DatasetInfo, DatasetMismatch, create_or_check, fingerprint, json_bytes, new_info, read_info

SPEC = {"hop_frames": 8, "tower": {"precision": "fp32", "weights_sha256": "aa"}, "views": 1}


def test_fingerprint_is_the_specs_value_not_its_writing():
    assert fingerprint({"b": [1, 2], "a": {"y": None, "x": "ü"}}) == fingerprint({"a": {"x": "ü", "y": None}, "b": (1, 2)})
    assert fingerprint(SPEC) != fingerprint(SPEC | {"views": 2})
    assert json_bytes({"b": 1.5, "a": "ü"}) == '{"a":"ü","b":1.5}'.encode()
    with pytest.raises(ValueError):
        fingerprint({"rate": float("nan")})


def test_create_then_check(tmp_path):
    info = new_info("features", SPEC, {"weights": "tower.pt"})
    create_or_check(tmp_path / "set", info)
    assert read_info(tmp_path / "set") == info
    create_or_check(tmp_path / "set", new_info("features", dict(reversed(SPEC.items())), {"weights": "elsewhere.pt"}))
    assert read_info(tmp_path / "set").provenance == {"weights": "tower.pt"}
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["dataset.json"]


def test_refusal_names_every_differing_field_with_both_values(tmp_path):
    create_or_check(tmp_path, new_info("features", SPEC))
    before = (tmp_path / "dataset.json").read_bytes()
    other = {"hop_frames": 4, "tower": {"precision": "fp32", "weights_sha256": "bb"}, "codec": {"name": "encodec24"}}
    with pytest.raises(DatasetMismatch) as error:
        create_or_check(tmp_path, new_info("features", other))
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  spec.codec.name: '(absent)' there, 'encodec24' here",
        "  spec.hop_frames: 8 there, 4 here",
        "  spec.tower.weights_sha256: 'aa' there, 'bb' here",
        "  spec.views: 1 there, '(absent)' here",
    ]
    with pytest.raises(DatasetMismatch, match="kind: 'features' there, 'media' here"):
        create_or_check(tmp_path, new_info("media", SPEC))
    assert (tmp_path / "dataset.json").read_bytes() == before


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        read_info(tmp_path)
    (tmp_path / "dataset.json").write_text('{"kind": "features"')
    with pytest.raises(ValueError, match="not a dataset's description"):
        read_info(tmp_path)
    create_or_check(tmp_path / "a", new_info("features", SPEC))
    written = json.loads((tmp_path / "a" / "dataset.json").read_text())
    (tmp_path / "a" / "dataset.json").write_text(json.dumps(written | {"schema_version": 99}))
    with pytest.raises(DatasetMismatch, match="schema version 99"):
        read_info(tmp_path / "a")
    (tmp_path / "a" / "dataset.json").write_text(json.dumps(written | {"spec": SPEC | {"views": 3}}))
    with pytest.raises(ValueError, match="edited"):
        read_info(tmp_path / "a")
    with pytest.raises(ValueError, match="expected one of media, features"):
        DatasetInfo("sound", 1, SPEC, fingerprint(SPEC))
