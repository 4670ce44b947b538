"""Generate fields of a linear heat equation with noise, whose conditional law has a closed form.

    python -m prepare.heat --out data/heat --trajectories 200 --frames 100

On the torus [0, 2 pi]^2, periodic: dw = viscosity Lap w dt - friction w dt + noise, white in time
and smooth in space. Each Fourier mode with wavenumbers of at most WAVES is an independent
Ornstein-Uhlenbeck process, so that the mean, the covariance and every score of a perfect forecast
are known. A test of forecasts that needs no oracle.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import scipy.fft

from prepare import trajectories
from runtime.console import UserError, run_command

VISCOSITY, FRICTION = 0.02, 0.2
# Largest wavenumber of the noise along each axis.
WAVES = 8
# The stationary variance of a mode is proportional to (1 + k^2 / KNEE^2)^-2, and that of a pixel
# is 1.
KNEE = 4.0


class Heat:
    """The equation, solved exactly for many fields at once.

    A state is an array (B, size, size // 2 + 1) complex: the coefficients of
    exp(i (k_x x + k_y y)), k_x in columns and k_y in rows in the order of scipy.fft.

    every: time between two frames. rate, variance: (size, size // 2 + 1), decay of the modes and
    their stationary mean square.
    """

    def __init__(self, size: int = 32, every: float = 0.5):
        if size <= 2 * WAVES:
            raise UserError(f"--size must be at least {2 * WAVES + 1}, got {size}")
        self.size = size
        self.every = every
        kx = np.arange(size // 2 + 1)
        ky = np.rint(np.fft.fftfreq(size, 1 / size))[:, None]
        square = kx**2 + ky**2
        self.rate = VISCOSITY * square + FRICTION
        retained = (np.abs(ky) <= WAVES) & (kx <= WAVES) & (square > 0)
        variance = retained * (1 + square / KNEE**2) ** -2.0
        # A mode with k_x > 0 stands for its complex conjugate, too.
        self.weight = np.where(kx > 0, 2, 1)
        self.variance = variance / (variance * self.weight).sum()

    def start(self, noise: list[np.random.Generator]) -> np.ndarray:
        """Stationary states (B, size, size // 2 + 1), one for each generator of noise."""
        return self.draw(noise, self.variance)

    def advance(self, state: np.ndarray, noise: list[np.random.Generator]) -> np.ndarray:
        """Simulate the states for `every`. noise: one generator for each of them."""
        decay, variance = self.law(self.every)
        return state * decay + self.draw(noise, variance)

    def law(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """The conditional law of each mode after `time`: a Gaussian with mean decay * state and
        mean square `variance`. -> decay, variance."""
        return np.exp(-self.rate * time), -self.variance * np.expm1(-2 * self.rate * time)

    def draw(self, noise: list[np.random.Generator], variance: np.ndarray) -> np.ndarray:
        """Gaussian coefficients of real fields, with this mean square (size, size // 2 + 1)."""
        white = np.stack([rng.standard_normal((self.size, self.size)) for rng in noise])
        # The transform of white noise has mean square 1 in this norm.
        waves = scipy.fft.rfft2(white, norm="ortho")
        return waves * np.sqrt(variance)

    def to_field(self, state: np.ndarray) -> np.ndarray:
        """The fields (B, 1, size, size) of the states."""
        return scipy.fft.irfft2(state, (self.size, self.size), norm="forward")[:, None]

    def from_field(self, field: np.ndarray) -> np.ndarray:
        """The states of the fields (B, 1, size, size)."""
        return scipy.fft.rfft2(np.asarray(field[:, 0], np.float64), norm="forward")

    # ------------------------------------------------------------------------------- closed form
    def conditional_mean(self, field: np.ndarray, time: float) -> np.ndarray:
        """E[w(t + time) | w(t) = field], for fields (B, 1, size, size)."""
        decay, _ = self.law(time)
        return self.to_field(self.from_field(field) * decay)

    def conditional_covariance(self, time: float) -> np.ndarray:
        """Covariance (size, size) of pixel (0, 0) with all pixels, given the field `time` before.

        It depends on the distance of two pixels only, and not on the given field.
        """
        _, variance = self.law(time)
        return scipy.fft.irfft2(variance, (self.size, self.size), norm="forward")

    def conditional_deviation(self, time: float) -> float:
        """Standard deviation of a pixel, given the field `time` before."""
        return math.sqrt(self.conditional_covariance(time)[0, 0])

    def crps(self, time: float) -> float:
        """The expected CRPS of the perfect forecast: deviation / sqrt(pi)."""
        return self.conditional_deviation(time) / math.sqrt(math.pi)


KIND = trajectories.Kind(
    module="prepare.heat",
    source="stochastic heat equation",
    build=Heat,
    channels=("temperature",),
    facts={"viscosity": VISCOSITY, "friction": FRICTION, "waves": WAVES, "knee": KNEE},
    size=32,
)


def source_name() -> str:
    """Return the value of the shards' attribute `source`."""
    return KIND.source


make = partial(trajectories.make, KIND)


def main() -> int:
    return trajectories.run(KIND, __doc__.splitlines()[0])


if __name__ == "__main__":
    run_command(main)
