"""The other ranks of a run: none, or those that the MPI library knows."""

import os
from collections.abc import Mapping
from typing import Protocol, TypeVar

T = TypeVar("T")

_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Set by Open MPI, by MPICH's Hydra, and by any launcher that speaks PMIx."""


class Ranks(Protocol):
    """This rank's number, and what ranks do together."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of all ranks."""
        ...

    @property
    def ranks_on_host(self) -> int:
        """Ranks that share this host's memory and file systems."""
        ...

    def allgather(self, item: T) -> list[T]:
        """Every rank's item, in rank order, for every rank."""
        ...

    def gather(self, item: T) -> list[T] | None:
        """Every rank's item, in rank order, for rank 0; None for the others."""
        ...

    def barrier(self) -> None:
        """Return when every rank is here."""
        ...


class Alone:
    """A run of one rank."""

    rank = 0
    size = 1
    ranks_on_host = 1

    def allgather(self, item: T) -> list[T]:
        """The one item."""
        return [item]

    def gather(self, item: T) -> list[T] | None:
        """The one item."""
        return [item]

    def barrier(self) -> None:
        """Everybody is here."""


class MpiRanks:
    """The ranks of MPI's world."""

    def __init__(self) -> None:
        from mpi4py import MPI  # noqa: PLC0415 - an optional package; importing it starts MPI

        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        on_host = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self.ranks_on_host: int = on_host.Get_size()
        on_host.Free()

    def allgather(self, item: T) -> list[T]:
        """Every rank's item, in rank order, for every rank."""
        items: list[T] = self._world.allgather(item)
        return items

    def gather(self, item: T) -> list[T] | None:
        """Every rank's item, in rank order, for rank 0; None for the others."""
        items: list[T] | None = self._world.gather(item, root=0)
        return items

    def barrier(self) -> None:
        """Return when every rank is here."""
        self._world.Barrier()


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks of this run: MPI's where an MPI launcher started this process."""
    if any(variable in environment for variable in _MPI_SIZE_VARIABLES):
        return MpiRanks()
    return Alone()
