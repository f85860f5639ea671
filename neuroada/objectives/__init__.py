"""What is learnt, one file an objective: it encodes examples, computes the loss, and says what scores the result."""

from neuroada.objectives.base import Objective, Validation, make_objective, objective_class

__all__ = ["Objective", "Validation", "make_objective", "objective_class"]
