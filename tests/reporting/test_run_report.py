"""A run's report and model card hold the run's numbers, and nothing of the machine."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.registry import METHODS
from neuroada.reporting import write_report
from neuroada.reporting.charts import column_labels, nice_ticks
from neuroada.reporting.deltas import moved
from neuroada.reporting.published import published_scores
from neuroada.runs.metadata import write_metadata
from neuroada.runs.run_folder import RunFolder

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of LLaMA-7B's recipe as its folder would be, with two adapted modules and one task scored."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    load_recipe("llama7b_math", [f"output_dir={folder}", "data_dir=/secret/place/data"]).save(folder / "recipe.yaml")
    lines = [
        {"step": s, "loss": 1 / s, "lr": 1e-3 / s, "tokens_per_second": 1234.0, "peak_memory_bytes": 5_000_000_000}
        for s in range(1, 61)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_metadata(
        folder,
        method="NeuroAda, k = 20",
        objective="causal_lm",
        loss_unit="nats per answer token",
        trainable=40,
        parameters=4000,
        steps=60,
        strategy="zero3",
        world_size=8,
    )
    interval = {"sound": [0.31, 0.42], "published": [0.3, 0.4]}
    entry = {"n": 321, "sound": 0.365, "published": 0.351, "interval": interval, "unseen": None, "baseline": 0.0}
    (folder / "results.json").write_text(json.dumps({"tasks": {"gsm8k": entry}}))
    (folder / "base").mkdir()
    (folder / "base" / "results.json").write_text(json.dumps({"tasks": {"gsm8k": {**entry, "sound": 0.0712}}}))
    deltas = {
        f"base_model.model.{name}.neuroada_delta": torch.full((4, 2), 0.25 * (i + 1)) for i, name in enumerate(MODULES)
    }
    save_file(deltas, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def test_the_report_holds_the_numbers(run: Path) -> None:
    text = write_report(run).read_text()
    # trained, step, loss; the task's score, interval, published table and base; where it moved; the environment
    expected = ("1.0000 %", "60", "0.0167", "36.5 (31.0–42.0)", "35.1", "7.1", "321", "1,234", "5.00 GB", "2.5", "5.0",
                "zero3", f"{torch.__version__}", "NeuroAda, k = 20", "0.003")  # fmt: skip
    for number in expected:
        assert number in text, number


def test_the_report_is_one_file_and_tells_no_path(run: Path) -> None:
    text = write_report(run).read_text()
    assert not re.search(r"https?://|src=|@import|url\(", text)
    for told in (text, (run / "adapter" / "README.md").read_text()):
        assert "/secret" not in told
        assert str(run.parent) not in told


def test_published_numbers_belong_to_their_model_and_k(run: Path) -> None:
    assert published_scores(RunFolder.read(run))["gsm8k"] == pytest.approx(0.365)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for change in ({"k": 19}, {"selection": "random"}, {"method": "lora"}):
        changed = {**recipe, "adapter": {**recipe["adapter"], **change}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(changed))
        assert published_scores(RunFolder.read(run)) == {}
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": "someone/else"}))
    assert published_scores(RunFolder.read(run)) == {}


def test_the_card_is_ready_for_the_hub(run: Path) -> None:
    write_report(run)
    _, front, text = (run / "adapter" / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["base_model"] == "yahma/llama-7b-hf"
    assert values["library_name"] == "peft"
    assert "neuroada" in values["tags"]
    assert "license" not in values  # the user's to choose
    assert "| gsm8k | 321 | 36.5 | 35.1 | 36.5 | 7.1 |" in text


def test_a_run_without_scores_says_how_to_score_it(run: Path) -> None:
    (run / "results.json").unlink()
    assert "Not scored yet" in write_report(run).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        write_report(tmp_path)


def test_how_far_weights_moved(tmp_path: Path) -> None:
    """NeuroAda's and LoRA's norms without the dense change equal the dense change's."""
    torch.manual_seed(0)
    base, (a, b) = tmp_path / "base", (torch.randn(2, 6), torch.randn(4, 2))
    base.mkdir()
    weights = {f"{name}.weight": torch.randn(4, 6) for name in MODULES}
    save_file(weights, base / "model.safetensors")
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6, "r": 2}))
    delta = torch.randn(4, 3)
    save_file(
        {
            f"base_model.model.{MODULES[0]}.neuroada_delta": delta,
            f"base_model.model.{MODULES[1]}.lora_A.weight": a,
            f"base_model.model.{MODULES[1]}.lora_B.weight": b,
        },
        adapter / "adapter_model.safetensors",
    )
    (sparse,), (low_rank,) = (moved(METHODS.load(name), adapter, base) for name in ("neuroada", "lora"))
    assert (sparse["layer"], sparse["projection"]) == (0, "self_attn.q_proj")
    assert sparse["rms"] == pytest.approx(float(delta.square().mean().sqrt()))
    assert sparse["relative"] == pytest.approx(float(delta.norm() / weights[f"{MODULES[0]}.weight"].norm()))
    dense = 3 * b @ a
    assert (low_rank["layer"], low_rank["projection"]) == (1, "mlp.down_proj")
    assert low_rank["rms"] == pytest.approx(float(dense.square().mean().sqrt()), rel=1e-5)
    assert low_rank["relative"] == pytest.approx(float(dense.norm() / weights[f"{MODULES[1]}.weight"].norm()), rel=1e-5)
    assert moved(METHODS.load("neuroada"), adapter, None)[0]["relative"] is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.34, 1.21), (0.0, 24_300_000_000), (5.17, 5.46), (2.0, 2.0)])
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8
    assert {round(b - a, 9) for a, b in pairwise(ticks)} == {round(ticks[1] - ticks[0], 9)}


def test_columns_are_told_apart() -> None:
    assert column_labels(["self_attn.q_proj", "mlp.down_proj"]) == {"self_attn.q_proj": "q", "mlp.down_proj": "down"}
    names = ["attention.output.dense", "intermediate.dense", "output.dense"]
    assert len(set(column_labels(names).values())) == 3
