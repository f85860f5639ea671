"""What is particular to GLUE: the original TSV files, the metrics and the published split protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from neuroada.errors import UserError
from neuroada.files import read_text

T = TypeVar("T")

# Original files: folder, file of each split, columns (None: the first line names them).
_TSV_FILES = {"train": "train.tsv", "validation": "dev.tsv"}
_TSV: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "glue/sst2": ("glue/SST-2", None),
    "glue/cola": ("glue/CoLA", ("source", "label", "star", "sentence")),
}


def from_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a numeric label as a string, like every other column of an example."""
    label = row.get("label")
    return {**row, "label": str(label)} if isinstance(label, int | float) else row


def similarity(label: str) -> bool:
    """Whether `label` is a score of STS-B, 0 to 5."""
    try:
        return 0 <= float(label) <= 5
    except ValueError:
        return False


def tsv_file(name: str, split: str, data_dir: Path) -> Path | None:
    """Where the original layout has `split` of task `name`; None for a task or split that we do not read as TSV."""
    if name not in _TSV or split not in _TSV_FILES:
        return None
    return data_dir / _TSV[name][0] / _TSV_FILES[split]


def read_tsv(path: Path, name: str) -> list[dict[str, str]]:
    """The rows of an original file: fields split at tabs, nothing quoted. UserError naming a row of another width."""
    columns = _TSV[name][1]
    lines = read_text(path, limit=4 << 30).rstrip("\n").split("\n")
    if columns is None:
        columns = tuple(lines.pop(0).split("\t"))
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, row {number}: {len(fields)} fields separated by tabs, expected {len(columns)}: "
                f"{', '.join(columns)}"
            )
        rows.append(dict(zip(columns, fields, strict=True)))
    return rows


def split_validation(examples: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """The published protocol: a random part of the validation split to choose the epoch by, the rest to report.

    Returns (choose, report). `choose` has 1,000 examples where the split has over 5,000, else half, rounded down.
    Both keep the order of `examples`.
    """
    import numpy as np

    size = 1_000 if len(examples) > 5_000 else len(examples) // 2
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:size].tolist())
    return (
        [example for i, example in enumerate(examples) if i in chosen],
        [example for i, example in enumerate(examples) if i not in chosen],
    )


def score(metric: str, predictions: Sequence[float], labels: Sequence[float]) -> float:
    """`metric` (accuracy, matthews or pearson) of predictions against labels; 0 for the Pearson of a constant."""
    import numpy as np
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    if metric == "pearson":
        constant = np.ptp(predictions) == 0 or np.ptp(labels) == 0
        return 0.0 if constant else float(pearsonr(predictions, labels).statistic)
    return float({"accuracy": accuracy_score, "matthews": matthews_corrcoef}[metric](labels, predictions))
