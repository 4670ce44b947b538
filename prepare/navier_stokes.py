"""Generate vorticity fields of the stochastically forced Navier-Stokes equation on a torus.

    python -m prepare.navier_stokes --out data/navier_stokes --trajectories 200 --frames 100
    python -m prepare.navier_stokes --out data/navier_stokes --oracle 64 --members 64

The task with which arXiv 2403.13724 introduced the Föllmer interpolant. On [0, 2 pi]^2, periodic:

    dw + u . grad w dt = viscosity Lap w dt - friction w dt + forcing sum_k phi_k dB_k,
    u = (d_y psi, -d_x psi), -Lap psi = w,

with eight modes phi_k: sine and cosine of 6x, 7x, 5(x + y) and 8(x + y). Rows are y, columns are x.

--oracle continues states of held-out trajectories, each many times with fresh noise: draws from the
true conditional law, against which forecasts are judged.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import scipy.fft

from prepare import trajectories
from runtime.console import UserError, run_command

VISCOSITY, FRICTION, FORCING = 1e-3, 0.1, 1.0
# Wavenumbers (x, y) of the forcing, each with a sine and a cosine of amplitude 1.
FORCED = ((6, 0), (7, 0), (5, 5), (8, 8))
# Time step at 64 x 64; it is inversely proportional to the size. The fastest retained wave then
# turns by about 1.5 in a step, and the fourth-order Runge-Kutta method is stable up to 2.8.
STEP = 0.02
# Time from rest until the statistics are stationary.
SPIN_UP = 30.0


class NavierStokes:
    """The equation, discretised by a Fourier-Galerkin method (2/3 rule), for many fields at once.

    A state is an array (B, size, n) complex: the coefficients of exp(i (k_x x + k_y y)), k_x = 0,
    …, n - 1 in columns and k_y in rows in the order of scipy.fft, 0 where |k_y| >= n. Strang
    splitting: half a step of the linear part with its forcing, which is exact; a step of the
    advection by the fourth-order Runge-Kutta method; another half step of the linear part. The weak
    order is 2, and the order without forcing and damping is 4.

    every: time between two frames. step: largest time step; by default STEP for this size.
    """

    def __init__(
        self,
        size: int = 64,
        every: float = 0.5,
        step: float | None = None,
        viscosity: float = VISCOSITY,
        friction: float = FRICTION,
        forcing: float = FORCING,
        dtype: type = np.float32,
        spin_up: float = SPIN_UP,
    ):
        # Products of two retained waves must not alias to a retained wave: 3 (n - 1) < size.
        n = (size - 1) // 3 + 1
        if forcing and n <= max(max(k) for k in FORCED):
            raise UserError(f"--size must be at least 25, which resolves the forcing, got {size}")
        self.size = size
        self.every = every
        self.spin_up = spin_up
        self.dtype = np.dtype(dtype)
        self.steps = math.ceil(every / (step or STEP * 64 / size) - 1e-9)
        self.step = every / self.steps
        kx = np.arange(n)
        ky = np.rint(np.fft.fftfreq(size, 1 / size))[:, None]
        retained = np.abs(ky) < n
        square = kx**2 + ky**2
        rate = viscosity * square + friction
        complex_type = np.result_type(self.dtype, np.complex64)
        # Velocity (2, 1, size, n) over vorticity: u = i k_y / k^2 w, v = -i k_x / k^2 w.
        over = 1j / np.maximum(square, 1) * retained
        self.velocity = np.stack([ky * over, -kx * over])[:, None].astype(complex_type)
        self.retained = retained.astype(self.dtype)
        # -u . grad w = (d_yy - d_xx) (u v) + d_xy (u^2 - v^2), for a velocity without divergence.
        self.tendency = np.stack([(kx**2 - ky**2) * retained, -kx * ky * retained])
        self.tendency = self.tendency[:, None].astype(self.dtype)
        self.modes = tuple(np.array(FORCED).T[::-1])
        # Decay and deviation of the forced amplitudes over half a step and over a whole one.
        self.half = self._linear(rate, self.step / 2, forcing)
        self.whole = self._linear(rate, self.step, forcing)

    def _linear(
        self, rate: np.ndarray, time: float, forcing: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decay (size, n) and deviations (4,) of the linear part over `time`, which is an
        Ornstein-Uhlenbeck process in each mode."""
        forced = rate[self.modes]
        # -expm1(-2 r t) / (2 r) tends to t for a rate of zero.
        variance = np.where(forced > 0, -np.expm1(-2 * forced * time), 2 * time)
        variance = variance / np.where(forced > 0, 2 * forced, 2)
        deviation = forcing * np.sqrt(variance)
        return np.exp(-rate * time).astype(self.dtype), deviation.astype(self.dtype)

    def to_field(self, state: np.ndarray) -> np.ndarray:
        """Vorticity (B, 1, size, size) of a state."""
        return self._to_grid(state)[:, None]

    def from_field(self, field: np.ndarray) -> np.ndarray:
        """The state of vorticity fields (B, 1, size, size); waves that are not retained are
        dropped."""
        return self._to_waves(np.asarray(field[:, 0], self.dtype)) * self.retained

    def start(self, noise: list[np.random.Generator]) -> np.ndarray:
        """Stationary states (B, size, n), one for each generator of noise: simulated from rest."""
        state = np.zeros((len(noise), *self.half[0].shape), self.velocity.dtype)
        for _ in range(math.ceil(self.spin_up / self.every)):
            state = self.advance(state, noise)
        return state

    def advance(self, state: np.ndarray, noise: list[np.random.Generator]) -> np.ndarray:
        """Simulate the states for `every`. noise: one generator for each of them, so that a
        trajectory does not depend on the others of its batch."""
        # (steps + 1, B, 4): complex amplitudes of the forced waves.
        draws = np.stack([rng.standard_normal((self.steps + 1, 4, 2)) for rng in noise], 1)
        draws = (draws / 2).astype(self.dtype).view(self.velocity.dtype)[..., 0]
        state = self._force(state, self.half, draws[0])
        for k in range(1, self.steps):
            state = self._force(self._advect(state), self.whole, draws[k])
        return self._force(self._advect(state), self.half, draws[-1])

    def _force(
        self, state: np.ndarray, linear: tuple[np.ndarray, np.ndarray], draws: np.ndarray
    ) -> np.ndarray:
        """The linear part with its forcing. draws: (B, 4) complex, a cosine and a sine each."""
        decay, deviation = linear
        state = state * decay
        rows, columns = self.modes
        state[:, rows, columns] += draws * deviation
        return state

    def _advect(self, state: np.ndarray) -> np.ndarray:
        """A step of the fourth-order Runge-Kutta method for dw/dt = -u . grad w."""
        h = self.dtype.type(self.step)
        k1 = self._tend(state)
        k2 = self._tend(state + h / 2 * k1)
        k3 = self._tend(state + h / 2 * k2)
        k4 = self._tend(state + h * k3)
        k2 += k3
        k2 *= 2
        k2 += k1
        k2 += k4
        k2 *= h / 6
        k2 += state
        return k2

    def _tend(self, state: np.ndarray) -> np.ndarray:
        """-u . grad w of states (B, size, n), in four real transforms."""
        u, v = self._to_grid(state * self.velocity)
        products = np.empty((2, *u.shape), self.dtype)
        np.multiply(u, v, out=products[0])
        np.multiply(u - v, u + v, out=products[1])
        tendency = self._to_waves(products)
        tendency *= self.tendency
        return tendency[0] + tendency[1]

    def _to_grid(self, waves: np.ndarray) -> np.ndarray:
        """Coefficients (…, size, n) -> values (…, size, size)."""
        rows = scipy.fft.ifft(waves, axis=-2, norm="forward")
        return scipy.fft.irfft(rows, self.size, norm="forward")

    def _to_waves(self, values: np.ndarray) -> np.ndarray:
        """Values (…, size, size) -> coefficients (…, size, n), of which all rows are filled."""
        columns = scipy.fft.rfft(values, norm="forward")[..., : self.half[0].shape[1]]
        return scipy.fft.fft(columns, axis=-2, norm="forward")


def source_name() -> str:
    """Return the value of the shards' attribute `source`."""
    return KIND.source


KIND = trajectories.Kind(
    module="prepare.navier_stokes",
    source="stochastically forced Navier-Stokes equation",
    build=NavierStokes,
    channels=("vorticity",),
    facts={
        "viscosity": VISCOSITY,
        "friction": FRICTION,
        "forcing": FORCING,
        "forced": FORCED,
        "spin_up": SPIN_UP,
    },
    size=64,
)


make = partial(trajectories.make, KIND)


def main() -> int:
    return trajectories.run(KIND, __doc__.splitlines()[0])


if __name__ == "__main__":
    run_command(main)
