"""The manifest against real files, local copies, refusals, and GLUE's two forms."""

import json
import random
import socket
from pathlib import Path

import pytest

from neuroada.errors import UserError
from neuroada.sources import glue, llm_adapters
from neuroada.sources.datasets import SETS, SUITES, fetch_data
from neuroada.sources.download import Fingerprint, mismatch


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch):
    """Nothing here may reach beyond this machine."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def copies(shared_data: Path) -> Path:
    return shared_data / "llm_adapters"


def content(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_local_copy_is_in_the_manifest(copies: Path):
    files = sorted(copies.glob("*/*.json"))
    assert len(files) >= 18
    for file in files:
        entries = [cut[file.stem] for cut in llm_adapters.SETS[file.parent.name].values() if file.stem in cut]
        assert len(content(file)) in [entry["rows"] for entry in entries], file
        llm_adapters._verified_rows(file, file.parent.name, file.stem)


def test_the_manifest_adds_up():
    commonsense = [name for name in SUITES["commonsense"] if not name.startswith("commonsense")]
    rows = [llm_adapters.SETS[name]["files"]["train"]["rows"] for name in commonsense]
    assert len(rows) == 8
    assert sum(rows) == llm_adapters.SETS["commonsense_170k"]["files"]["train"]["rows"] == 170_420
    assert len(SETS) == len(set(SETS)) == 18 + 8


def test_copies_and_finds_them_again(copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    paths = fetch_data("boolq", tmp_path, copies)
    assert paths == [tmp_path / "boolq" / "train.json", tmp_path / "boolq" / "test.json"]
    assert [len(content(path)) for path in paths] == [9_427, 3_270]
    assert "9,427 rows, copied" in capsys.readouterr().out
    assert fetch_data("boolq", tmp_path) == paths
    assert capsys.readouterr().out.count("already there") == 2
    assert not list(tmp_path.rglob("*.part"))


def test_a_clone_of_the_repository_serves_too(copies: Path, tmp_path: Path):
    clone = tmp_path / "clone"
    for place, copy in {
        "dataset/AddSub/test.json": "AddSub/test.json",
        "ft-training_set/math_10k.json": "math_10k/train.json",
    }.items():
        (clone / place).parent.mkdir(parents=True)
        (clone / place).write_bytes((copies / copy).read_bytes())
    assert fetch_data("AddSub", tmp_path / "data", clone) == [tmp_path / "data/AddSub/test.json"]
    assert fetch_data("math_10k", tmp_path / "data", clone) == [tmp_path / "data/math_10k/train.json"]


def test_the_divided_commonsense_15k_is_accepted(copies: Path, tmp_path: Path):
    paths = fetch_data("commonsense_15k", tmp_path, copies)
    assert {path.name: len(content(path)) for path in paths} == {"train.json": 10_583, "validation.json": 4_536}
    assert fetch_data("commonsense_15k", tmp_path) == paths


def whole_15k(copies: Path) -> bytes:
    """The public file, from its two parts: the division undone."""
    order = list(range(15_119))
    random.Random(llm_adapters.SEED).shuffle(order)
    shuffled = [
        row for split in ("train", "validation") for row in content(copies / "commonsense_15k" / f"{split}.json")
    ]
    rows = [row for _, row in sorted(zip(order, shuffled, strict=True), key=lambda pair: pair[0])]
    return json.dumps(rows, indent=4).encode()


def test_commonsense_15k_is_divided_as_the_authors_did(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the public file, whose blob id the manifest has, to their two files, byte by byte; downloaded once."""
    whole, wanted = whole_15k(copies), copies / "commonsense_15k"
    asked = []

    def download(url: str, target: Path, expected: Fingerprint, remedy: str) -> None:
        asked.append(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(whole)
        assert mismatch(target, expected) is None

    monkeypatch.setattr(llm_adapters, "download", download)
    clone = tmp_path / "clone" / "ft-training_set"
    clone.mkdir(parents=True)
    (clone / "commonsense_15k.json").write_bytes(whole)
    for out, source in ((tmp_path / "downloaded", None), (tmp_path / "copied", clone.parent)):
        for path in fetch_data("commonsense_15k", out, source):
            assert path.read_bytes() == (wanted / path.name).read_bytes()
    assert len(asked) == 1 and asked[0].endswith("/ft-training_set/commonsense_15k.json")


def test_a_whole_commonsense_15k_is_not_taken_for_its_part(copies: Path, tmp_path: Path):
    """As an earlier version stored it: scored on its own rows it would shine."""
    (tmp_path / "commonsense_15k").mkdir()
    (tmp_path / "commonsense_15k" / "train.json").write_bytes(whole_15k(copies))
    with pytest.raises(UserError, match=r"train\.json is not the published .*; remove it"):
        fetch_data("commonsense_15k", tmp_path, copies)


def test_a_suite_brings_what_is_there_and_names_what_is_not(copies: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no SVAMP/test\.json, mawps/test\.json there; without --from"):
        fetch_data("arithmetic", tmp_path, copies)
    assert len(list(tmp_path.glob("*/test.json"))) == 5


def test_another_file_is_refused(tmp_path: Path):
    copy = tmp_path / "from" / "AddSub" / "test.json"
    copy.parent.mkdir(parents=True)
    copy.write_text("[]")
    with pytest.raises(UserError, match=r"AddSub/test\.json is not the published .*expected 170,411 bytes, found 2"):
        fetch_data("AddSub", tmp_path / "data", tmp_path / "from")
    assert not (tmp_path / "data").exists()


def test_a_file_of_the_users_is_not_overwritten(copies: Path, tmp_path: Path):
    own = tmp_path / "AddSub" / "test.json"
    own.parent.mkdir()
    own.write_text("[]")
    with pytest.raises(UserError, match="remove it or use another copy"):
        fetch_data("AddSub", tmp_path, copies)
    assert own.read_text() == "[]"


def test_without_a_network(tmp_path: Path):
    with pytest.raises(UserError, match=r"https://raw\.github.*/dataset/AddSub/test\.json .*--from DIR"):
        fetch_data("AddSub", tmp_path)


@pytest.mark.parametrize("name, near", [("bolq", "boolq"), ("arc-easy", "ARC-Easy"), ("glue/sst-2", "glue/sst2")])
def test_unknown_sets(name: str, near: str):
    with pytest.raises(UserError, match=f"unknown data set '{name}': did you mean .*{near}"):
        fetch_data(name)


def test_unknown_folder(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        fetch_data("boolq", tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("name, rows", [("sst2", 872), ("cola", 1_043)])
def test_glue_from_the_original_files(name: str, rows: int, shared_data: Path, tmp_path: Path):
    path, note = glue.fetch_split(name, "validation", tmp_path, shared_data)
    examples = content(path)
    assert path == tmp_path / "glue" / name / "validation.json"
    assert len(examples) == rows and "left out" not in note
    assert {tuple(example) for example in examples} == {("sentence", "label")}
    assert {example["label"] for example in examples} == {0, 1}


def tsv(folder: Path, place: str, *lines: str) -> None:
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text("".join(line + "\n" for line in lines))


def test_glue_pairs_words_and_scores(tmp_path: Path):
    tsv(tmp_path, "glue/RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel", '0\tA "b.\tC\tnot_entailment')
    tsv(tmp_path, "glue/STS-B/dev.tsv", "index\tsentence1\tsentence2\tscore", "0\tA\tB\t3.8")
    tsv(
        tmp_path,
        "glue/QQP/dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\tA\tB\t1",
        "4\t5\t6\tonly",
    )
    fetched = {name: glue.fetch_split(name, "validation", tmp_path, tmp_path) for name in ("rte", "stsb", "qqp")}
    assert content(fetched["rte"][0]) == [{"sentence1": 'A "b.', "sentence2": "C", "label": 1}]
    assert content(fetched["stsb"][0]) == [{"sentence1": "A", "sentence2": "B", "label": 3.8}]
    assert content(fetched["qqp"][0]) == [{"sentence1": "A", "sentence2": "B", "label": 1}]
    assert "1 incomplete rows left out" in fetched["qqp"][1]


def test_glue_mistakes_name_the_line(tmp_path: Path):
    header = "index\tsentence1\tsentence2\tlabel"
    tsv(tmp_path, "glue/RTE/dev.tsv", header, "0\tA\tB\tmaybe")
    with pytest.raises(UserError, match=r"dev\.tsv, line 2: label 'maybe' is not one of entailment, not_entailment"):
        glue.fetch_split("rte", "validation", tmp_path, tmp_path)
    tsv(tmp_path, "glue/RTE/train.tsv", header.replace("label", "gold"))
    with pytest.raises(UserError, match="no column 'label' in its header"):
        glue.fetch_split("rte", "train", tmp_path, tmp_path)
    assert not (tmp_path / "glue/rte").exists()


def test_glue_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    rows = [{"premise": "A", "hypothesis": "B", "label": 2, "idx": 0}]
    asked = []

    def load_dataset(path: str, name: str, *, split: str, revision: str) -> list[dict]:
        asked.append((path, name, split, revision))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    path, _ = glue.fetch_split("mnli", "validation", tmp_path, None)
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched", glue.REVISION)]
    assert content(path) == [{"sentence1": "A", "sentence2": "B", "label": 2}]

    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"nyu-mll/glue rte \(Couldn't reach.*DIR/glue/RTE"):
        glue.fetch_split("rte", "train", tmp_path, None)
