"""A quantised folder in the hands of transformers and PEFT: the same logits as by our own loading, or an error."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, pipeline

from neuroada import NeuroAdaConfig
from neuroada.errors import UserError
from neuroada.files import load_tensors, save_tensors
from neuroada.hf.quantised import pretrained_quantised
from neuroada.hf.quantised_config import GUARD, KEY
from neuroada.offline.quantise import quantise_folder
from neuroada.quantised import FORMATS, Quantisation, QuantisedLinear
from neuroada.sources.tiny import make_tiny

K = 4
X = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "tiny")
    model = LlamaForCausalLM.from_pretrained(folder / "tiny", dtype=torch.bfloat16)
    model.save_pretrained(folder / "tiny", max_shard_size="100KB")
    (folder / "tiny" / "model.safetensors").unlink()
    return folder / "tiny"


@pytest.fixture(scope="module")
def folders(tiny: Path) -> dict[str, Path]:
    """Quantised, by format."""
    for name in FORMATS:
        quantise_folder(tiny, tiny.parent / name, Quantisation(name, K))
    return {name: tiny.parent / name for name in FORMATS}


def ours(tiny: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return pretrained_quantised(AutoModelForCausalLM, str(tiny), dtype, Quantisation(name, K), "cpu")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=X).logits


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_gives_the_model_of_our_own_loading(
    tiny: Path, folders: dict[str, Path], name: str, dtype: torch.dtype
) -> None:
    model, found = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype, output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(isinstance(module, QuantisedLinear) for module in model.modules()) == 14
    assert logits(model).equal(logits(ours(tiny, name, dtype)))
    assert logits(LlamaForCausalLM.from_pretrained(folders[name], dtype=dtype)).equal(logits(model))


def test_transformers_alone_refuses_the_folder_and_says_why(folders: dict[str, Path]) -> None:
    code = """if True:
        import sys, transformers
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.LlamaForCausalLM):
            try:
                auto.from_pretrained(sys.argv[1])
            except ValueError as error:
                print(error)
    """
    refused = python(code, folders["nf4"])
    assert refused.returncode == 0, refused.stderr
    assert refused.stdout.count("`import neuroada`") == 3


@pytest.mark.parametrize("first", ["import neuroada", "import transformers.quantizers, neuroada"])
def test_importing_neuroada_is_enough_and_imports_nothing(folders: dict[str, Path], first: str) -> None:
    code = (
        f"import sys; {first}; print(sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))\n"
        "from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1]); print('loaded')"
    )
    done = python(code, folders["nf4"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded\n")
    if first == "import neuroada":
        assert done.stdout.startswith("[]\n")


def test_an_adapter_over_it_is_trained_loaded_and_merged_as_over_our_own(
    tiny: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = NeuroAdaConfig(k=K, target_modules="all-linear", task_type="CAUSAL_LM")
    expected, model = (
        get_peft_model(base, copy.deepcopy(config))
        for base in (ours(tiny, "nf4"), AutoModelForCausalLM.from_pretrained(folders["nf4"]))
    )
    for tuned in (expected, model):
        tuned(input_ids=X, labels=X).loss.backward()
        torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0).step()
    assert logits(model).equal(logits(expected))
    assert not logits(model).equal(logits(ours(tiny, "nf4")))
    model.save_pretrained(tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_fingerprint"].startswith("nf4:4:")
    assert told["base_model_name_or_path"] == str(folders["nf4"])

    base = AutoModelForCausalLM.from_pretrained(folders["nf4"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert logits(loaded).equal(logits(expected))
    assert logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")).equal(logits(expected))
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")).equal(logits(expected))
    with pytest.raises(UserError, match="trained on other base weights"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["int8"]), tmp_path / "adapter")

    as_trained = logits(expected)
    for name, tuned in (("merged", loaded), ("merged ours", expected)):
        tuned.merge_and_unload().save_pretrained(tmp_path / name)
        assert not {KEY, GUARD} & set(json.loads((tmp_path / name / "config.json").read_text()))
        assert logits(LlamaForCausalLM.from_pretrained(tmp_path / name)).equal(as_trained)


def test_it_generates_and_is_made_dense(tiny: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    answer = pipeline("text-generation", model=str(folders["int8"]))("one and two", max_new_tokens=4, do_sample=False)
    assert len(answer[0]["generated_text"]) > len("one and two")
    model = AutoModelForCausalLM.from_pretrained(folders["fp8"])
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert logits(LlamaForCausalLM.from_pretrained(tmp_path / "dense")).equal(logits(ours(tiny, "fp8")))


def test_what_would_be_silently_wrong_is_refused(tiny: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["nf4"])
    with pytest.raises(ValueError, match="neuroada and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="neuroada and is not serializable"):
        ours(tiny, "nf4").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(folders["nf4"], quantization_config=BitsAndBytesConfig(load_in_4bit=True))

    partly = tmp_path / "partly"
    quantise_folder(tiny, partly, Quantisation("nf4", K))
    for path in partly.glob("*.safetensors"):
        tensors, metadata = load_tensors(path)
        rest = {name: value for name, value in tensors.items() if not name.endswith("up_proj.packed")}
        save_tensors(path, rest, metadata)
    with pytest.raises(UserError, match=r"the files hold no .*up_proj\.packed"):
        AutoModelForCausalLM.from_pretrained(partly)
    (partly / "config.json").write_text((folders["nf4"] / "config.json").read_text().replace('"nf4"', '"nf3"'))
    with pytest.raises(UserError, match="no known quantisation"):
        AutoModelForCausalLM.from_pretrained(partly)
