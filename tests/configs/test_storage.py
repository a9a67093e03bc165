"""Files by path: the same behaviour on a local file system and on a real object store, also through one that misbehaves."""

import os
import time

import pytest

from configs import storage


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "there") if request.param == "local" else request.getfixturevalue("s3").url


def test_what_is_written_is_read(root):
    storage.write_bytes(f"{root}/a/b.bin", b"0123456789")
    assert storage.read_bytes(f"{root}/a/b.bin") == b"0123456789"
