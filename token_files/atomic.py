"""Writing a file as a whole or not at all, for files that another process may read or a kill may interrupt."""

import os
from pathlib import Path


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path` under a temporary name, then rename it.

    A reader sees the old file or the new one, never a part of it. Raises OSError; the old file is then still there.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.part')
    with open(temporary, 'wb') as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())  # the content reaches the disk before the new name does, so that a power cut cannot lose it
    os.replace(temporary, path)
