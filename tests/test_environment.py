"""What a launcher, or a shell that remembers one, says of the ranks."""

import pytest

from neuroada import environment
from neuroada.errors import UserError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.NUMBERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE = 'x'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1'"),
        ({"LOCAL_RANK": "a[$(id)]"}, "LOCAL_RANK = "),
        ({"SLURM_NNODES": "1\n2"}, "SLURM_NNODES = "),
        ({"RANK": "1"}, "RANK = 1 in the environment without WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE = 4 in the environment without RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2 in the environment with WORLD_SIZE = 2"),
    ],
)
def test_odd_variables_are_one_line(monkeypatch, variables, said) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        environment.check_environment()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, (0, 1, 0)),
        ({"LOCAL_RANK": "3"}, (0, 1, 0)),  # left in the shell
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
    ],
)
def test_ranks(monkeypatch, variables, ranks) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.check_environment()
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == ranks


def test_ranks_that_are_not_reached_are_one_line() -> None:
    with pytest.raises(UserError, match="does not reach the others at MASTER_ADDR"), environment.joining():
        raise RuntimeError("connect() timed out\nmore")
