"""GLUE's tasks on a tiny random RoBERTa: every engine alike, the adapter's folder, the best epoch, mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed_runs import ENGINES, assert_same_curve, losses, run_ranks
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from neuroada.adapter import NeuroAdaLinear
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.errors import UserError
from neuroada.objectives import epoch_validation
from neuroada.objectives.epoch_validation import EpochValidation, predict
from neuroada.objectives.texts import encode_texts
from neuroada.sources.tiny import make_tiny_encoder
from neuroada.tasks.data import load_examples
from neuroada.tasks.table import get_task
from neuroada.training.trainer import train

ALPHABETS = ["nopqrst", "abcdefg"]  # the letters of a text with label 0, and with label 1


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer RoBERTa without a head and without dropout; one token a byte, <s> text </s>."""
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 and STS-B in miniature: 40 examples to train, 21 to validate."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("validation", 21)):
        labels = rng.integers(0, 2, n).tolist()
        texts = ["".join(rng.choice(list(ALPHABETS[label]), rng.integers(2, 12))) for label in labels]
        sst2 = [{"sentence": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        stsb = [
            {"sentence1": "a" * int(a), "sentence2": "b" * int(b), "label": float(a)}
            for a, b in rng.integers(1, 6, (n, 2))
        ]
        for name, rows in (("sst2", sst2), ("stsb", stsb)):
            (folder / "glue" / name).mkdir(parents=True, exist_ok=True)
            (folder / "glue" / name / f"{split}.json").write_text(json.dumps(rows))
    return folder


def fields(encoder: Path, data: Path, output: Path, *overrides: str) -> list[str]:
    """8 steps of 12 texts, an epoch every 3.3 steps, a checkpoint at step 4."""
    return [f"model={encoder}", f"data_dir={data}", f"output_dir={output}", "adapter.k=3", "optimizer.lr=5e-3",
            "train.epochs=50", "train.global_batch_size=12", "train.micro_batch_size=2", "train.max_steps=8",
            "checkpoint.every_steps=4", "evaluate.frozen_base=false", *overrides]  # fmt: skip


def recipe(*args: object) -> Recipe:
    return load_recipe("minilm_sst2", fields(*args))  # type: ignore[arg-type]


def result(folder: Path, task: str = "glue/sst2") -> dict:
    return json.loads((folder / "results.json").read_text())["tasks"][task]


def assert_same_result(folder: Path, expected: Path) -> None:
    """Scores alike, losses within 1e-5, of every epoch and of the run."""
    epochs, others = (json.loads((run / "validation.json").read_text())["epochs"] for run in (folder, expected))
    assert len(epochs) == len(others)
    for one, other in zip(epochs, others, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    found, wanted = result(folder), result(expected)
    for entry, other in ((found, wanted), (found["validation"], wanted["validation"])):
        assert entry.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-5)
    assert found == wanted


RUNS = [("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("zero1", 3), ("zero3", 3), ("fsdp2", 3)]


@pytest.fixture(scope="module")
def runs(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The folder of a run by (engine, ranks)."""
    root = tmp_path_factory.mktemp("runs")
    folders = {(engine, ranks): root / f"{engine}x{ranks}" for engine, ranks in [("single", 1), *RUNS]}
    train(recipe(encoder, data, folders["single", 1], *ENGINES["single"]))
    _run(encoder, data, {key: folders[key] for key in RUNS}, root)
    return folders


def _run(encoder: Path, data: Path, folders: dict[tuple[str, int], Path], root: Path) -> None:
    for world_size in sorted({ranks for _, ranks in folders}):
        wanted = [
            {"recipe": "minilm_sst2", "overrides": fields(encoder, data, folder, *ENGINES[engine])}
            for (engine, ranks), folder in folders.items() if ranks == world_size
        ]  # fmt: skip
        run_ranks(world_size, "ranks.py", wanted, root)


def test_every_engine_learns_and_scores_the_same(runs: dict[tuple[str, int], Path]) -> None:
    expected = losses(runs["single", 1])
    adapter = load_file(runs["single", 1] / "adapter" / "adapter_model.safetensors")
    assert expected[8] < expected[1]
    for folder in runs.values():
        assert_same_curve(losses(folder), expected)
        assert_same_result(folder, runs["single", 1])
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert found.keys() == adapter.keys()
        for name, tensor in adapter.items():
            assert found[name].float().numpy() == pytest.approx(tensor.float().numpy(), abs=2e-5), (folder, name)


def test_a_new_classifier_is_read_only_once_it_is_set(
    runs: dict[tuple[str, int], Path], encoder: Path, data: Path, tmp_path: Path
) -> None:
    """No file has its values, and a sharded model is built in memory that holds whatever was there before."""
    wanted = [
        {"recipe": "minilm_sst2", "overrides": fields(encoder, data, tmp_path / engine, *ENGINES[engine])}
        for engine in ("fsdp2", "zero3")
    ]
    run_ranks(2, "ranks.py", wanted, tmp_path, NAN_IN_NEW_MEMORY="1")
    for engine in ("fsdp2", "zero3"):
        assert_same_curve(losses(tmp_path / engine), losses(runs["single", 1]))


def test_the_command_trains_and_scores(encoder: Path, data: Path, tmp_path: Path) -> None:
    """As a user runs it: the recipe as it is, the frozen base first."""
    folder = tmp_path / "run"
    wanted = fields(encoder, data, folder, "evaluate.frozen_base=true", "train.max_steps=2")
    command = [sys.executable, "launch/train.py", "--recipe", "minilm_sst2", *wanted]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert result(folder)["frozen_base"] == result(folder / "frozen_base")["sound"]
    assert done.stdout.endswith(f"trained: {folder / 'adapter'}\n")


def test_the_merge_command_writes_a_classifier(
    runs: dict[tuple[str, int], Path], encoder: Path, tmp_path: Path
) -> None:
    adapter, out = runs["single", 1] / "adapter", tmp_path / "merged"
    command = [sys.executable, "launch/merge.py", "--adapter", str(adapter), "--out", str(out), "--verify"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():  # to the bit is what --verify saw
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits)


def test_a_run_moves_to_another_engine_and_world_size(
    runs: dict[tuple[str, int], Path], encoder: Path, data: Path, tmp_path: Path
) -> None:
    """Classifier, its one-dimensional biases and the best epoch so far go along."""
    moves = {
        ("fsdp2", 2): ("zero3", 3),
        ("zero3", 2): ("fsdp2", 3),
        ("zero2", 3): ("single", 1),
        ("zero3", 3): ("zero2", 2),
    }
    folders = {}
    for target, start in moves.items():
        folders[target] = tmp_path / f"{target[0]}x{target[1]}"
        shutil.copytree(runs[start] / "checkpoints" / "step-000004", folders[target] / "checkpoints" / "step-000004")
        for name in ("metrics.jsonl", "validation.json"):
            shutil.copy(runs[start] / name, folders[target])
    _run(encoder, data, folders, tmp_path)
    for target, folder in folders.items():
        assert_same_curve(losses(folder), losses(runs["single", 1]))
        found, source = ((run / "metrics.jsonl").read_text().splitlines() for run in (folder, runs[moves[target]]))
        assert found[:4] == source[:4] and found[4] != source[4]  # went on at step 5, with another time taken
        assert_same_result(folder, runs["single", 1])


def test_the_folder_loads_with_peft_and_scores_what_was_reported(encoder: Path, data: Path, tmp_path: Path) -> None:
    train(recipe(encoder, data, tmp_path, "train.max_steps=40", "engine.name=single"))
    reported = result(tmp_path)
    assert reported["n"] == 11 and reported["validation"]["n"] == 10
    assert reported["sound"] > reported["baseline"]

    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    adapted = {module.name for module in model.modules() if isinstance(module, NeuroAdaLinear)}
    assert len(adapted) == 2 * 6  # query, key, value and three dense a layer
    assert not any("classifier" in name for name in adapted)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    examples = load_examples(get_task("glue/sst2"), "validation", data)
    _, report = epoch_validation.split_validation(examples, seed=42)
    for scored in (model, model.merge_and_unload()):
        right = [
            str(scored(**tokenizer(example["sentence"], return_tensors="pt")).logits.argmax().item())
            == example["label"]
            for example in report
        ]
        assert sum(right) / len(right) == reported["sound"]
        own = [
            scored(**tokenizer(example["sentence"], return_tensors="pt"), labels=torch.tensor([int(example["label"])]))
            for example in report
        ]
        assert sum(one.loss.item() for one in own) / len(own) == pytest.approx(reported["loss"], rel=1e-5)


def test_the_frozen_base_stands_beside(encoder: Path, data: Path, tmp_path: Path) -> None:
    own = ["adapter.neuron_fraction=0.5", "adapter.layers=[0]"]  # fields of the method, which a classifier alone lacks
    train(recipe(encoder, data, tmp_path, "evaluate.frozen_base=true", "engine.name=single", *own))
    assert result(tmp_path)["frozen_base"] == result(tmp_path / "frozen_base")["sound"]
    alone = load_file(tmp_path / "frozen_base" / "adapter" / "adapter_model.safetensors")
    assert {name.split("model.model.")[-1] for name in alone} == {
        f"base_model.model.classifier.{layer}.{part}".split("model.model.")[-1]
        for layer in ("dense", "out_proj") for part in ("weight", "bias")
    }  # fmt: skip


def test_regression_by_pearson(encoder: Path, data: Path, tmp_path: Path) -> None:
    train(recipe(encoder, data, tmp_path, "task=glue/stsb", "evaluate.tasks=[]", "train.max_steps=40",
                 "engine.name=single"))  # fmt: skip
    found = result(tmp_path, "glue/stsb")
    assert found["metric"] == "pearson" and found["interval"] is None
    assert found["sound"] > 0.5


def test_a_bf16_encoder_has_an_fp32_classifier(encoder: Path, data: Path, tmp_path: Path) -> None:
    train(recipe(encoder, data, tmp_path, "train.dtype=bf16", "engine.name=single"))
    assert losses(tmp_path)[8] < losses(tmp_path)[1]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for name, tensor in saved.items() if "neuroada_idx" not in name)


def test_the_best_epoch_is_kept(encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs end with steps 4, 7 and 8, the run's end: the second ties with the first at a lower loss, the third with
    the second at the same loss."""
    # Choosing, reporting; choosing, reporting; choosing.
    scores = iter([(0.75, 0.4), (0.1, 0.0), (0.75, 0.3), (0.2, 0.0), (0.75, 0.3)])
    monkeypatch.setattr(EpochValidation, "_score", lambda self, texts: next(scores))
    wanted = recipe(encoder, data, tmp_path, "engine.name=single", "checkpoint.every_steps=7")
    train(wanted)
    found = result(tmp_path)
    assert (found["sound"], found["validation"]["score"], found["validation"]["step"]) == (0.2, 0.75, 7)
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    state = load_file(tmp_path / "checkpoints" / "step-000007" / "state.safetensors")
    name = "base_model.model.classifier.{}out_proj.bias"
    assert kept[name.format("")].equal(state["value/" + name.format("modules_to_save.default.")])


def test_predictions_do_not_depend_on_the_batch(encoder: Path, data: Path) -> None:
    task, tokenizer = get_task("glue/sst2"), AutoTokenizer.from_pretrained(encoder)
    texts = encode_texts(load_examples(task, "validation", data), task, tokenizer, 64)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1)
    seen = [predict(_rank(model, 0, 1), texts, rows, pad_id=1) for rows in (1, 4, 21)]
    for other in seen[1:]:
        assert np.stack(other) == pytest.approx(np.stack(seen[0]), rel=1e-5, abs=1e-6)
    parts = [predict(_rank(model, rank, 4), texts, 2, pad_id=1) for rank in range(4)]  # 21 texts: short ranks repeat
    assert np.sum(parts, axis=0) == pytest.approx(np.stack(seen[0]), rel=1e-5, abs=1e-6)


def _rank(model: torch.nn.Module, rank: int, world_size: int) -> SimpleNamespace:
    return SimpleNamespace(
        model=model, rank=rank, world_size=world_size, device=torch.device("cpu"), reduce=lambda values: values
    )


def test_a_long_text_is_cut_and_counted(encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts = encode_texts(
        [{"sentence": "x" * 50, "label": "1"}, {"sentence": "x", "label": "0"}], get_task("glue/sst2"), tokenizer, 16
    )
    assert texts.lengths.tolist() == [16, 3] and texts.full == 1
    assert "1 of max_length" in str(texts)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.packing=true", "train.packing = true: an encoder reads one text"),
        ("evaluate.tasks=[glue/sst2,gsm8k]", "evaluate.tasks: a classifier of glue/sst2 cannot be scored on gsm8k"),
        ("evaluate.limit=1", "1 validation example cannot be divided in two"),
    ],
)
def test_mistakes(encoder: Path, data: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        train(recipe(encoder, data, tmp_path, "engine.name=single", override))


def test_only_a_classifier_trains_alone(tiny: Path, tmp_path: Path) -> None:
    wanted = load_recipe("tiny_arithmetic", [f"model={tiny}", f"output_dir={tmp_path}", "adapter.method=head"])
    with pytest.raises(UserError, match=r"adapter.method = head: LlamaForCausalLM has no classifier"):
        train(wanted)
