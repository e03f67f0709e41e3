"""Non-negative least squares that learns from one observation at a time and forgets what is no longer confirmed."""

import math
from collections.abc import Sequence
from itertools import combinations

HUBER = 3.0
"""An observation further off than this many typical errors counts less, in proportion: one hiccup moves little."""
WARM_UP = 20
"""So many observations say what a typical error is; before, all count fully."""


class RecursiveLeastSquares:
    """Coefficients w >= 0 with targets ~ w . features, for a handful of features.

    Keeps the information matrix M and the evidence M.w. All of it fades by `forgetting` in so far as an observation
    is news; one that repeats the last ones fades what is known along its own direction (directional forgetting:
    Kulhavy, Automatica 20(5), 1984). So a change is followed under mixed load, and a load that is always the same does
    not wash out what it says nothing about. `scales` are typical magnitudes of the features; `confidence` says how many
    observations of that magnitude the `initial` coefficients are worth.
    """

    def __init__(
        self,
        scales: Sequence[float],
        *,
        initial: Sequence[float] | None = None,
        forgetting: float = 0.999,
        confidence: float = 1e-6,
    ) -> None:
        if not 0 < forgetting < 1:
            raise ValueError(f"The forgetting factor lies between 0 and 1, not at {forgetting}.")
        if any(scale <= 0 for scale in scales) or confidence <= 0:
            raise ValueError("Scales and confidence are positive.")
        size = len(scales)
        start = [0.0] * size if initial is None else [w * s for w, s in zip(initial, scales, strict=True)]
        self._scales = tuple(scales)
        self._lose = 1.0 - forgetting
        self._information = [[confidence if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._evidence = [confidence * w for w in start]
        self._solution: list[float] | None = start
        self._typical_error = 0.0
        self.num_observations = 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The coefficients, in units of target per unit of feature."""
        return tuple(w / s for w, s in zip(self._solve(), self._scales, strict=True))

    @property
    def typical_error(self) -> float:
        """Mean absolute error of the latest predictions, in units of the target, each made before its observation."""
        return self._typical_error

    def predict(self, features: Sequence[float]) -> float:
        """The target expected for these features."""
        return sum(w * f / s for w, f, s in zip(self._solve(), features, self._scales, strict=True))

    def observe(self, features: Sequence[float], target: float) -> None:
        """Learn that these features gave this target. Features of zeros teach nothing."""
        if not any(features):
            return
        root = math.sqrt(self._weigh(abs(target - self.predict(features))))
        x = [root * f / s for f, s in zip(features, self._scales, strict=True)]
        self._forget(x)
        for i, xi in enumerate(x):
            row = self._information[i]
            self._evidence[i] += xi * root * target
            for j, xj in enumerate(x):
                row[j] += xi * xj
        self._solution = None

    def _weigh(self, error: float) -> float:
        """How much an observation counts (Huber, 1964), judged by the errors before it."""
        self.num_observations += 1
        limit = HUBER * self._typical_error
        rate = max(0.02, 1 / self.num_observations)
        is_known = self.num_observations > WARM_UP and limit > 0
        # Clipped at twice the limit, so that a lasting change soon counts as typical and is learned.
        self._typical_error += rate * ((min(error, 2 * limit) if is_known else error) - self._typical_error)
        return limit / error if is_known and error > limit else 1.0

    def _forget(self, x: list[float]) -> None:
        spread = _solve_linear(self._information, x)
        free = _solve_linear(self._information, self._evidence)
        leverage = 0.0 if spread is None else sum(v * s for v, s in zip(x, spread, strict=True))
        if free is None or leverage <= 0:
            return
        # Where an observation repeats itself for ever, its leverage settles at `lose`: then all fading is along it.
        overall = self._lose * min(1.0, max(0.0, leverage / self._lose - 1))
        along = (self._lose - overall) / leverage
        expected = sum(v * w for v, w in zip(x, free, strict=True))
        for i, xi in enumerate(x):
            row = self._information[i]
            self._evidence[i] = (1 - overall) * (self._evidence[i] - along * xi * expected)
            for j, xj in enumerate(x):
                row[j] = (1 - overall) * (row[j] - along * xi * xj)

    def _solve(self) -> list[float]:
        if self._solution is None:
            self._solution = solve_nonnegative(self._information, self._evidence)
        return self._solution


def solve_nonnegative(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """The w >= 0 of least w.M.w/2 - v.w, for a positive definite M of few rows, by trying which entries are zero.

    The Karush-Kuhn-Tucker conditions single out one set; where rounding leaves none, the best feasible point wins.
    """
    size = len(vector)
    best, best_value = [0.0] * size, 0.0
    for count in range(size, 0, -1):
        for free in combinations(range(size), count):
            part = _solve_linear([[matrix[i][j] for j in free] for i in free], [vector[i] for i in free])
            if part is None or min(part) < 0:
                continue
            point = [0.0] * size
            for i, value in zip(free, part, strict=True):
                point[i] = value
            if _is_optimal(matrix, vector, point, free):
                return point
            value = -sum(v * w for v, w in zip(vector, point, strict=True)) / 2
            if value < best_value:
                best, best_value = point, value
    return best


def _is_optimal(matrix: list[list[float]], vector: list[float], point: list[float], free: tuple[int, ...]) -> bool:
    """Whether no entry held at zero would rather grow."""
    return all(
        sum(m * w for m, w in zip(matrix[i], point, strict=True)) >= vector[i]
        for i in range(len(vector))
        if i not in free
    )


def _solve_linear(matrix: list[list[float]], vector: list[float]) -> list[float] | None:
    """Gaussian elimination with partial pivoting; None for a singular matrix."""
    size = len(vector)
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        if abs(rows[pivot][column]) < 1e-300:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for i in range(column + 1, size):
            factor = rows[i][column] / rows[column][column]
            if factor:
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    solution = [0.0] * size
    for i in range(size - 1, -1, -1):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
