"""A saved classifier, scored again by `neuroada evaluate`: the numbers of the run that trained it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neuroada.cli import evaluate
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.objectives.epoch_validation import table
from neuroada.reporting import write_report
from neuroada.sources.tiny import make_tiny_encoder
from neuroada.training.trainer import train

ROOT = Path(__file__).parents[2]
KINDS = {
    "adapter in bf16": ["train.dtype=bf16"],
    "adapter in fp32": ["train.dtype=fp32", "evaluate.limit=17"],
    "lora": ["train.dtype=bf16", "adapter.method=lora"],
    "whole model": ["train.dtype=fp32", "adapter.method=full", "optimizer.lr=1e-3"],
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNLI in miniature, its mismatched split of longer texts."""
    folder = tmp_path_factory.mktemp("data") / "glue" / "mnli"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, rows, longest in (("train", 30, 9), ("validation", 21, 9), ("validation_mismatched", 14, 20)):
        labels = rng.integers(0, 3, rows).tolist()
        texts = ["".join(rng.choice(list(("abcd", "efgh", "ijkl")[label]), rng.integers(3, longest)))
                 for label in labels]  # fmt: skip
        pairs = [{"sentence1": text, "sentence2": text[::-1], "label": label}
                 for text, label in zip(texts, labels, strict=True)]  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps(pairs))
    return folder.parents[1]


@pytest.fixture(scope="module")
def runs(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each kind of run saved. The first epoch of each is not the last, and may be the best."""
    root = tmp_path_factory.mktemp("runs")
    saved = {}
    for number, (kind, overrides) in enumerate(KINDS.items()):
        fields = [f"model={encoder}", f"data_dir={data}", f"output_dir={root / str(number)}", "task=glue/mnli",
                  "adapter.k=3", "optimizer.lr=5e-3", "train.global_batch_size=10", "train.micro_batch_size=5",
                  "train.epochs=3", "engine.name=single", "evaluate.frozen_base=false", *overrides]  # fmt: skip
        saved[kind] = train(load_recipe("minilm_sst2", fields))
    return saved


def scored(capsys: pytest.CaptureFixture[str], saved: Path, data: Path, *more: str) -> dict:
    kind = "--adapter" if (saved / "adapter_config.json").is_file() else "--model"
    evaluate.main([kind, str(saved), "--tasks", "glue/mnli", "--data-dir", str(data), "--json", *more])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_the_run(kind, runs, data, capsys, tmp_path):
    """To the last bit: scores, losses and intervals of the chosen, the reported and the mismatched part."""
    wanted = json.loads((runs[kind].parent / "results.json").read_text())
    found = scored(capsys, runs[kind], data, "--out", str(tmp_path))
    assert found["tasks"] == wanted["tasks"] and found["adapter"] == wanted["adapter"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    entry = found["tasks"]["glue/mnli"]
    assert entry["mismatched"]["n"] == 14 and entry["n"] == (9 if "fp32" in kind and kind != "whole model" else 11)
    assert entry["mismatched"]["loss"] != entry["loss"]


def test_scored_in_its_own_folder(runs, data, capsys):
    """The report is written again; the run's choice of an epoch stays in the results."""
    saved = runs["lora"]
    before = json.loads((saved.parent / "results.json").read_text())
    found = scored(capsys, saved, data)
    assert found["tasks"] == before["tasks"]
    assert "glue/mnli, mismatched" in (saved.parent / "report.html").read_text()
    with pytest.raises(UserError, match=r"--out .*: holds the scores of"):
        scored(capsys, runs["adapter in bf16"], data, "--out", str(saved.parent))


def test_ranks_share_the_texts(runs, data, tmp_path):
    saved = runs["adapter in fp32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "launch/evaluate.py", "--adapter", str(saved), "--tasks", "glue/mnli", "--data-dir", str(data),
               "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "mismatched" in done.stdout
    found, wanted = (json.loads((folder / "results.json").read_text())["tasks"]["glue/mnli"]
                     for folder in (tmp_path, saved.parent))  # fmt: skip
    assert found["sound"] == wanted["sound"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_the_table_has_both_splits(runs):
    results = json.loads((runs["lora"].parent / "results.json").read_text())
    assert [*table(results).columns[0].cells] == ["glue/mnli", "glue/mnli, mismatched"]
    assert write_report(runs["lora"].parent).is_file()


def test_mistakes(runs, encoder, data, capsys, tmp_path):
    saved = runs["lora"]
    with pytest.raises(UserError, match=r"recipe.yaml and validation.json are not in the folder above"):
        scored(capsys, encoder, data)
    with pytest.raises(UserError, match=r"--backend hf"):
        scored(capsys, saved, data, "--backend", "vllm")
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    (tmp_path / "glue" / "sst2" / "validation.json").write_text('[{"sentence": "a", "label": 1}]')
    with pytest.raises(UserError, match=r"task glue/sst2: .* was trained on glue/mnli"):
        evaluate.main(["--adapter", str(saved), "--tasks", "glue/sst2", "--data-dir", str(tmp_path)])
    (tmp_path / "glue" / "mnli").mkdir()
    (tmp_path / "glue" / "mnli" / "validation.json").write_text(
        (data / "glue" / "mnli" / "validation.json").read_text()
    )
    with pytest.raises(UserError, match=r"validation_mismatched.json: no such file, .* fetch it"):
        scored(capsys, saved, tmp_path)
