"""What is learnt, one file an objective: it encodes examples, computes the loss, and says what scores the result."""

from neuroada.objectives.base import Objective, make_objective, objective_class
from neuroada.objectives.validation import Validation

__all__ = ["Objective", "Validation", "make_objective", "objective_class"]
