"""File systems of a test's own; and the suites' assertions are explained like those of tests."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# Not imported from there: it must happen before the modules are.
pytest.register_assert_rewrite(
    "mlpstorage.testing.io_rig",
    "mlpstorage.testing.io_suite",
    *(f"mlpstorage.testing.suite_{part}" for part in ("hooks", "objects", "places", "threads")),
)

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts something on a new directory, as `mount ARGUMENT... DIRECTORY`; skips where that is not allowed."""
    with ExitStack() as mounted:

        def mount_one(*arguments: str) -> Path:
            target = tmp_path / f"mounted {len(list(tmp_path.iterdir()))}"
            target.mkdir()
            done = subprocess.run(["/bin/mount", *arguments, str(target)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"mount {arguments} is refused here (it takes root): {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["/bin/umount", "--lazy", str(target)], check=True)
            return target

        yield mount_one


@pytest.fixture
def tmpfs(mount: Mount) -> Path:
    """A file system in memory of 64 MiB."""
    return mount("-t", "tmpfs", "-o", "size=64m", "none")
