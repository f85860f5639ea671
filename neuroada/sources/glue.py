"""GLUE: from the hub's `nyu-mll/glue`, or from the original TSV files.

Written as `<out>/glue/<name>/<split>.json`: a list of {"sentence", "label"} or {"sentence1", "sentence2", "label"};
texts verbatim, labels numbered as on the hub, stsb's a similarity in 0..5. The test splits carry no labels and are left
out. mnli's `validation` is the matched one; `validation_mismatched` lies beside it.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada.errors import UserError
from neuroada.files import read_text, write_text
from neuroada.sources.errors import NotInSource

HUB = "nyu-mll/glue"
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"

Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """One split: its name on the hub, and its file in the original layout."""

    hub: str
    tsv: str


@dataclass(frozen=True)
class GlueSet:
    """How one set names its columns: in the original TSV files, and on the hub (where the label is always `label`)."""

    folder: str
    tsv: tuple[str, ...]  # text columns
    tsv_label: str
    hub: tuple[str, ...]  # text columns
    classes: tuple[str, ...] = ()  # the TSV's label words in the order of their numbers; empty: the TSV has numbers
    number: type[int] | type[float] = int
    header: tuple[str, ...] | None = None  # for a TSV without a header line


ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
SETS = {
    "cola": GlueSet("CoLA", ("sentence",), "label", ("sentence",), header=("source", "label", "mark", "sentence")),
    "mnli": GlueSet("MNLI", PAIR, "gold_label", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mrpc": GlueSet("MRPC", ("#1 String", "#2 String"), "Quality", PAIR),
    "qnli": GlueSet("QNLI", ("question", "sentence"), "label", ("question", "sentence"), ENTAILMENT),
    "qqp": GlueSet("QQP", ("question1", "question2"), "is_duplicate", ("question1", "question2")),
    "rte": GlueSet("RTE", PAIR, "label", PAIR, ENTAILMENT),
    "sst2": GlueSet("SST-2", ("sentence",), "label", ("sentence",)),
    "stsb": GlueSet("STS-B", PAIR, "score", PAIR, number=float),
}
SPLITS = {"train": Split("train", "train.tsv"), "validation": Split("validation", "dev.tsv")}
MNLI_SPLITS = {
    "train": Split("train", "train.tsv"),
    "validation": Split("validation_matched", "dev_matched.tsv"),
    "validation_mismatched": Split("validation_mismatched", "dev_mismatched.tsv"),
}


def splits(name: str) -> dict[str, Split]:
    """The labelled splits of a set, by the name they are written under."""
    return MNLI_SPLITS if name == "mnli" else SPLITS


def fetch_split(name: str, split: str, out: Path, source: Path | None) -> tuple[Path, str]:
    """Write one split, from `<source>/glue/<folder>/*.tsv` if a source is given, else from the hub.

    Returns its path and what was done, in words.
    """
    target = out / "glue" / name / f"{split}.json"
    if target.exists():
        return target, "already there"
    origin = splits(name)[split]
    if source is None:
        rows, note = list(_from_hub(name, origin.hub)), f"from {HUB}"
    else:
        place = f"glue/{SETS[name].folder}/{origin.tsv}"
        file = source / place
        if not file.is_file():
            raise NotInSource(place)
        rows, incomplete = read_tsv(file, SETS[name])
        note = f"from {file}" + (f" ({incomplete} incomplete rows left out)" if incomplete else "")

    write_text(target, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    return target, f"{len(rows):,} rows, {note}"


def read_tsv(file: Path, layout: GlueSet) -> tuple[list[Row], int]:
    """Rows of an original GLUE file, and how many were left out because columns are missing (the hub drops them too:
    QQP has a few). UserError for a header without the columns or a label that is none."""
    with io.StringIO(read_text(file, limit=4 << 30), newline="") as lines:
        reader = csv.DictReader(lines, fieldnames=layout.header, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = (*layout.tsv, layout.tsv_label)
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise UserError(f"{file}: no column {column!r} in its header {list(reader.fieldnames or ())}")
        rows, incomplete = [], 0
        for fields in reader:
            if any(fields[column] is None for column in columns):
                incomplete += 1
                continue
            word = fields[layout.tsv_label]
            try:
                label = layout.classes.index(word) if layout.classes else layout.number(word)
            except ValueError:
                wanted = f"one of {', '.join(layout.classes)}" if layout.classes else "a number"
                raise UserError(f"{file}, line {reader.line_num}: label {word!r} is not {wanted}") from None
            rows.append(_row((fields[column] for column in layout.tsv), label))
    return rows, incomplete


def _from_hub(name: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(HUB, name, split=split, revision=REVISION)
    except (OSError, RuntimeError) as error:  # the hub's client has no common class for "not reachable"
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"could not load https://huggingface.co/datasets/{HUB} {name} ({first_line}): "
            f"pass --from DIR with the original files in DIR/glue/{SETS[name].folder}"
        ) from error
    for fields in dataset:
        yield _row((fields[column] for column in SETS[name].hub), fields["label"])


def _row(texts: Iterable[str], label: float) -> Row:
    texts = list(texts)
    keys = PAIR if len(texts) == 2 else ("sentence",)
    return {**dict(zip(keys, texts, strict=True)), "label": label}
