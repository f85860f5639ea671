"""Reading: every kind of file, folders, saved data sets; what is told of damaged ones."""

import gzip
import json

import datasets
import pytest

from neuroada.config.data import Dataset
from neuroada.data.sources import find_source
from neuroada.errors import UserError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i} NA 007"} for i in range(5)]


def rows(path, **spec):
    return list(find_source(Dataset(path=str(path), **spec)).rows())


def values(path, **spec):
    return [row.values for row in rows(path, **spec)]


def write_as(folder, suffix):
    table = datasets.Dataset.from_list(ROWS)
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    elif suffix == ".parquet":
        table.to_parquet(path)
    elif suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="\t" if suffix == ".tsv" else ",")
    else:
        table.save_to_disk(folder / "saved")
        next((folder / "saved").glob("*.arrow")).rename(path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".parquet", ".csv", ".tsv", ".arrow"])
def test_files(tmp_path, suffix):
    path = write_as(tmp_path, suffix)
    assert values(path) == ROWS
    assert [row.where for row in rows(path)][-1] == f"{path}, row 5"


def test_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert values(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]


def test_csv_values_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n007,NA\n1.50,\n")
    assert values(tmp_path / "a.csv") == [
        {"prompt": "007", "completion": "NA"},
        {"prompt": "1.50", "completion": ""},
    ]


def test_a_large_json_list_in_pieces(tmp_path):
    wanted = [{"text": f"{i} " + '[{}], \\" ' * (i % 50), "n": [i, {"x": None}]} for i in range(20_000)]
    (tmp_path / "a.json").write_text(json.dumps(wanted))
    assert values(tmp_path / "a.json") == wanted


def test_objects_keep_their_own_keys(tmp_path):
    wanted = [{"tools": [{"city": {"type": "string"}}]}, {"tools": [{"place": 3}], "more": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, wanted)))
    assert values(tmp_path / "a.jsonl") == wanted


def test_globs_and_folders_and_splits(tmp_path):
    for split in ("train", "test"):
        for shard in range(2):
            (tmp_path / f"{split}-{shard}.jsonl").write_text(json.dumps({"text": f"{split}{shard}"}))
    (tmp_path / "README.md").write_text("not data")
    assert [row["text"] for row in values(tmp_path / "tr*.jsonl")] == ["train0", "train1"]
    assert [row["text"] for row in values(tmp_path)] == ["train0", "train1"]
    assert [row["text"] for row in values(tmp_path, split="test")] == ["test0", "test1"]
    with pytest.raises(UserError, match="split 'validation' does not exist; it has test, train"):
        rows(tmp_path, split="validation")


def test_saved_data_sets(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "two")
    assert values(tmp_path / "one") == values(tmp_path / "two") == ROWS
    assert values(tmp_path / "two", split="test") == ROWS[:1]
    with pytest.raises(UserError, match="split 'dev' does not exist; it has test, train"):
        rows(tmp_path / "two", split="dev")


def test_fingerprints_follow_content(tmp_path):
    def fingerprint():
        return find_source(Dataset(path=str(tmp_path / "a.jsonl"))).fingerprint()

    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "a.jsonl").write_text('{"text": "b"}')
    assert fingerprint() != first


def test_a_bad_line_is_told_and_the_rest_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\n')
    found = rows(tmp_path / "a.jsonl")
    assert [row.values for row in found] == [{"text": "a"}, None, {"text": "b"}]
    assert found[1].where.endswith("row 2") and "not JSON at column" in found[1].error


@pytest.mark.parametrize("form", ["[{}]", "{}"], ids=["a list", "a line each"])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": "a", "text": "b"}', "key 'text' stands twice"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ('{"text": "a", "n": NaN}', "NaN"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "beyond 64 bits"),
        ('{"text": ' + "[" * 200 + "]" * 200 + "}", "nested deeper than 60"),
    ],
)
def test_a_row_that_json_allows_and_nothing_can_use(tmp_path, form, row, said):
    suffix = "json" if "[" in form else "jsonl"
    (tmp_path / f"a.{suffix}").write_text(form.replace("{}", row))
    [found] = rows(tmp_path / f"a.{suffix}")
    assert found.values is None and found.where.endswith("row 1") and said in found.error


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "[" * 3000, "nested too deep"),
        ("a.json", '[{"a":' + "[" * 100_000, "nested too deep"),
        ("a.json", '[{"text": "a"}, {"text": ', "not JSON after row 1"),
        ("a.json", '[{"text": "a"}', "not JSON after row 1"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8b\x08 nothing", "cannot be read"),
        ("a.jsonl.xz", b"\xfd7zXZ\0 nothing", "cannot be read"),
        ("a.parquet", b"PAR1 half a file", "a.parquet: .*incomplete"),
        ("a.arrow", b"ARROW1 half", "a.arrow: .*incomplete"),
        ("a.csv", 'a,b\n"1', "a.csv: .*incomplete"),
        ("a.docx", "x", "data of this kind is not read"),
    ],
)
def test_damaged_files(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as found:
        rows(path)
    assert "\n" not in str(found.value) and str(path) in str(found.value)


def test_a_compression_that_takes_another_package(tmp_path, monkeypatch):
    """fsspec would read the compressed bytes as they are."""
    monkeypatch.setattr("neuroada.data.sources.available_compressions", lambda: [None, "gzip"])
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: zstandard is not installed; pip install zstandard, or"):
        rows(tmp_path / "a.jsonl.zst")


def test_half_a_parquet_file(tmp_path):
    path = write_as(tmp_path, ".parquet")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="incomplete"):
        rows(path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"path": "nowhere/a.jsonl"}, "nowhere/a.jsonl: no such file or folder"),
        ({"path": "nowhere/*.jsonl"}, "matches no file"),
        ({"path": "{folder}"}, "holds no data"),
        ({"path": "{folder}/a.jsonl", "split": "test"}, "a file has no splits"),
        ({"path": "{folder}/a.jsonl", "revision": "main"}, "revision is of hub data sets only"),
    ],
)
def test_not_found(tmp_path, spec, said):
    if "a.jsonl" in spec["path"] and "{" in spec["path"]:
        (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match=said):
        find_source(Dataset(**{**spec, "path": spec["path"].format(folder=tmp_path)}))


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(datasets.exceptions.DatasetNotFoundError("x"))
    )
    with pytest.raises(UserError, match="nobody/nothing: no such file, and no such data set on the hub"):
        rows("nobody/nothing")


def test_nothing_of_a_data_set_is_executed(tmp_path):
    (tmp_path / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / f"{tmp_path.name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    assert values(tmp_path) == [{"text": "a"}]
    assert not (tmp_path / "ran").exists()
