"""What several unit tests share."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_file_system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of the type and with the options that the test gives; skips without leave to mount."""
    kind, options = request.param
    target = tmp_path / kind
    target.mkdir()
    arguments = ["/bin/mount", "-t", kind, "-o", options, "none", str(target)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{kind} cannot be mounted here: {done.stderr.strip()}")
    yield target
    subprocess.run(["/bin/umount", "--lazy", str(target)], check=True)
