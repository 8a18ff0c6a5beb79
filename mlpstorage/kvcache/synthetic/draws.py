"""Random numbers of synthetic users, made of `random.Random.random` alone.

That is the one method whose sequence Python promises to keep for a seed; the distributions are made of it here, so that
a seed means the same workload on every Python version.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from mlpstorage.kvcache.synthetic.block_ids import hash64

Draw = Callable[[], float]
"""A source of uniform numbers from 0 up to, but without, 1."""


def source(name: str) -> Draw:
    """The stream of uniform numbers that belongs to `name`."""
    return random.Random(hash64(name)).random  # noqa: S311 - a workload, no secret


class Distribution(Protocol):
    """What a number that is not whole, such as a pause in seconds, is drawn from."""

    def sample(self, draw: Draw) -> float:
        """One number, made of as many uniform ones as it takes."""
        ...  # pragma: no cover


@dataclass(frozen=True, slots=True)
class Always:
    """The same number every time; takes no uniform one."""

    value: float

    def sample(self, _draw: Draw) -> float:
        """The number."""
        return self.value


@dataclass(frozen=True, slots=True)
class Exponential:
    """Pauses without memory: many short ones, few of several times the mean."""

    mean: float

    def sample(self, draw: Draw) -> float:
        """One number, 0 or more; takes one uniform one."""
        return -self.mean * math.log(1.0 - draw())


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """Lengths and pauses as they are measured, to a good approximation: many short ones, a few long ones.

    Attributes:
        median: Half of the draws are below it.
        sigma: Standard deviation of the logarithm: two thirds of the draws lie within a factor `exp(sigma)`.
        most: Larger draws are cut to it.
    """

    median: float
    sigma: float
    most: int

    @classmethod
    def of_mean(cls, mean: float, *, sigma: float, most: int) -> Self:
        """The distribution that has this mean before it is cut at `most`."""
        return cls(median=mean * math.exp(-sigma * sigma / 2), sigma=sigma, most=most)

    def sample(self, draw: Draw) -> float:
        """One number above 0, at most `most`; takes two uniform ones, whatever their values."""
        # Box and Muller's normal variate.
        normal = math.sqrt(-2.0 * math.log(1.0 - draw())) * math.cos(math.tau * draw())
        return min(self.median * math.exp(self.sigma * normal), float(self.most))

    def tokens(self, draw: Draw) -> int:
        """One whole number from 1 to `most`."""
        return max(round(self.sample(draw)), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Either:
    """One of two distributions, by chance.

    Attributes:
        usual: The one that most draws are of.
        rare: The other one.
        rare_share: Part of the draws that are of `rare`.
    """

    usual: Distribution
    rare: Distribution
    rare_share: float

    def sample(self, draw: Draw) -> float:
        """One number; takes one uniform one for the choice, and what the chosen distribution takes."""
        return (self.rare if draw() < self.rare_share else self.usual).sample(draw)
