"""What belongs to a score: the two rules it is counted by, and its interval."""

import math

RULES = ("published", "sound")


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927): two accuracies in 0..1. n >= 1."""
    z = 1.959963984540054  # the normal distribution's 97.5 % quantile
    p, z2 = correct / n, z * z / n
    centre = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
