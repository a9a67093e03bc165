"""Videos by their http(s) address: read whole, tried again while the server is unwell. Knows bytes; no media, and no address but the one it is given.

Addresses are used as they stand, with their query: a signed one stays what it is. Nothing is asked of a server when clips are listed.
"""

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request

from configs.storage import StorageError

TRIES = 5
TIMEOUT_SECONDS = 30.0
MOST_BYTES = 4 << 30
"""Larger than any clip: what does not end is not read for ever."""
PAGES = ("youtube.com", "youtu.be")
"""Where an address is a page's, and no video's."""


def is_web(path: str) -> bool:
    """Whether a path is an address that this module reads."""
    return path.startswith(("http://", "https://"))


def check(url: str) -> str:
    """The address, or a ValueError for one that cannot be a video's."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if not host or host.endswith(PAGES):
        raise ValueError(f"{url!r} is no video's address; fetch such videos with a tool for that, and give their files")
    return url


def read(url: str, *, pause_seconds: float = 1.0) -> bytes:
    """The bytes at an address. FileNotFoundError where the server says that there is nothing, StorageError where it does not give them.

    A pause between tries is twice as long as the one before.
    """
    why: Exception | None = None
    for attempt in range(TRIES):
        try:
            return _once(url)
        except _UnwellError as error:
            why = error
        time.sleep(pause_seconds * 2**attempt if attempt + 1 < TRIES else 0)
    raise StorageError(f"{url}: not read after {TRIES} tries ({why}); check that the server can be reached and is well") from why


class _UnwellError(Exception):
    """What another try may do better."""


def _once(url: str) -> bytes:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "soundshard"}), timeout=TIMEOUT_SECONDS) as response:
            data = response.read(MOST_BYTES + 1)
            missing = response.length or 0  # what was promised and did not come; a bounded read says nothing of it
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(2, "no such file", url) from error
        if error.code < 500 and error.code not in (408, 429):
            raise StorageError(f"{url}: the server refuses it ({error.code} {error.reason})") from error
        raise _UnwellError(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _UnwellError(f"{type(error).__name__}: {error}") from error
    if len(data) > MOST_BYTES:
        raise StorageError(f"{url}: more than {MOST_BYTES >> 30} GiB; no clip is that large")
    if missing:
        raise _UnwellError(f"{missing} bytes are missing")
    return data
