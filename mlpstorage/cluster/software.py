"""Versions of the Python packages that the numbers of a run can depend on."""

from collections.abc import Sequence

PACKAGES = ("numpy", "pydantic", "xxhash", "mpi4py", "obstore", "liburing", "zstandard")


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """The installed version of each package; None for one that is not installed. Imports none of them."""
    from importlib import metadata  # noqa: PLC0415 - slow to import, and start-up needs none of it

    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions
