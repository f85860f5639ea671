"""A quantised folder, and whole runs over a quantised base: trained, merged and evaluated as over any other."""

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import losses
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.evaluation.load import load
from neuroada.evaluation.source import Source
from neuroada.hf.quantised import pretrained_quantised
from neuroada.offline.merge import merge
from neuroada.offline.quantise import quantise_folder
from neuroada.quantised import Quantisation
from neuroada.sources.tiny import make_tiny
from neuroada.training.trainer import train

K = 4
NF4 = Quantisation("nf4", K)
X = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in bf16, in two files."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "first")
    (folder / "tiny").mkdir()
    for path in (folder / "first").iterdir():
        if path.suffix != ".safetensors":
            (folder / "tiny" / path.name).write_bytes(path.read_bytes())
    model = LlamaForCausalLM.from_pretrained(folder / "first", dtype=torch.bfloat16)
    model.save_pretrained(folder / "tiny", max_shard_size="100KB")
    assert (folder / "tiny" / "model.safetensors.index.json").is_file()
    return folder / "tiny"


@pytest.fixture(scope="module")
def packed(tiny: Path) -> Path:
    done = quantise_folder(tiny, tiny.parent / "packed", NF4)
    assert done["layers"] == 14
    assert done["bytes"] < done["bytes_before"]
    return tiny.parent / "packed"


def run(tiny: Path, name: str, *overrides: str) -> Path:
    output = tiny.parent / "runs" / name
    fields = [f"output_dir={output}", f"data_dir={tiny.parent / 'data'}", "train.max_steps=4", f"adapter.k={K}",
              "train.dtype=bf16", "engine.name=single", *overrides]  # fmt: skip
    train(load_recipe("tiny_arithmetic", fields))
    return output


@pytest.fixture(scope="module")
def trained(tiny: Path) -> Path:
    return run(tiny, "loaded", f"model={tiny}", "base.model_dtype=nf4")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=X).logits


def as_trained(tiny: Path, trained: Path) -> torch.Tensor:
    base = pretrained_quantised(AutoModelForCausalLM, str(tiny), torch.bfloat16, NF4, "cpu")
    return logits(PeftModel.from_pretrained(base, str(trained / "adapter")))


def test_a_run_over_the_folder_is_the_run_that_quantises_as_it_loads(tiny: Path, packed: Path, trained: Path) -> None:
    again = run(tiny, "packed", f"model={packed}")
    assert losses(again) == losses(trained)
    names = "adapter/adapter_model.safetensors"
    assert (again / names).read_bytes() == (trained / names).read_bytes()
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert config["base_fingerprint"].startswith("nf4:4:")


def test_merging_gives_the_model_that_was_trained(tiny: Path, packed: Path, trained: Path, tmp_path: Path) -> None:
    expected = as_trained(tiny, trained)
    done = merge(trained / "adapter", tiny, tmp_path / "merged")
    assert 0 < float(done["quantisation_error"].split()[0]) < 0.2
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert logits(merged).equal(expected)
    merge(trained / "adapter", packed, tmp_path / "of packed")
    assert logits(LlamaForCausalLM.from_pretrained(tmp_path / "of packed", dtype=torch.bfloat16)).equal(expected)
    merge(trained / "adapter", tiny, tmp_path / "original", into="original")
    assert not logits(LlamaForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)).equal(expected)
    with pytest.raises(UserError, match="--into original"):
        merge(trained / "adapter", packed, tmp_path / "refused", into="original")
    assert not (tmp_path / "refused").exists()


def test_evaluation_loads_the_base_that_was_trained_on(tiny: Path, packed: Path, trained: Path) -> None:
    model, _ = load(Source(str(tiny), trained / "adapter"), "bf16", torch.device("cpu"))
    assert logits(model).equal(as_trained(tiny, trained))
    alone, _ = load(Source(str(packed)), "bf16", torch.device("cpu"))
    assert logits(alone).equal(
        logits(pretrained_quantised(AutoModelForCausalLM, str(tiny), torch.bfloat16, NF4, "cpu"))
    )


def test_what_does_not_fit_is_told_in_a_line(tiny: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is already quantised"):
        quantise_folder(packed, tmp_path / "again", NF4)
    with pytest.raises(UserError, match=r"base\.model_dtype = int8.*is already quantised \(nf4, 4 exact"):
        run(tiny, "other", f"model={packed}", "base.model_dtype=int8")
    with pytest.raises(UserError, match=r"adapter\.k = 5: .* keeps 4 exact entries a row"):
        run(tiny, "more", f"model={packed}", "adapter.k=5")
    with pytest.raises(UserError, match="method = lora: does not run over a quantised base"):
        run(tiny, "lora", f"model={packed}", "adapter.method=lora")
