"""Questions of the training set that are never trained on: a validation set and a test set taken from it."""

import numpy as np

from neuroada.errors import UserError
from neuroada.tasks.data import question_key
from neuroada.tasks.table import Example

SEED = 0  # not the run's: every run of a comparison holds out the same questions


def hold_out(examples: list[Example], questions: int) -> tuple[list[Example], list[Example], list[Example]]:
    """(train, validation, test): every row of the questions left, and two disjoint parts of `questions` questions each.

    The validation part chooses between runs (a learning rate, say), the test part is reported. A question that
    several rows ask is held out with all of them; its first row is the one measured.
    """
    if not questions:
        return examples, [], []
    first = {question_key(example): example for example in reversed(examples)}
    if 2 * questions >= len(first):
        raise UserError(f"train.held_out = {questions}: twice as many are held out, and there are only {len(first)}")
    keys = sorted(first)
    chosen = [keys[i] for i in np.random.default_rng(SEED).permutation(len(keys))[: 2 * questions]]
    apart = set(chosen)
    train = [example for example in examples if question_key(example) not in apart]
    validation, test = ([first[key] for key in part] for part in (chosen[:questions], chosen[questions:]))
    return train, validation, test
