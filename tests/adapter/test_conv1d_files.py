"""GPT-2's files, whose neurons are columns: merged through the model, or refused; never read as rows."""

from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from tiny_models import X, logits, train_a_little
from transformers import GPT2Config, GPT2LMHeadModel

from neuroada import NeuroAdaConfig
from neuroada.cli import export
from neuroada.errors import UserError
from neuroada.offline.merge import merge
from neuroada.offline.select import select


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=int(X.max()) + 1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["attn.c_proj"]])  # the latter square
def test_an_adapter_is_merged_and_not_exported(base: Path, tmp_path: Path, targets: list[str]) -> None:
    config = NeuroAdaConfig(k=3, target_modules=targets, task_type="CAUSAL_LM")
    tuned: PeftModel = get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    train_a_little(tuned).eval().save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", base, tmp_path / "merged", verify=True)
    assert done["method"] == "NEUROADA" and done["verified"]
    assert logits(GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()).equal(logits(tuned))
    with pytest.raises(UserError, match=r"--into quantised: .* was trained over an unquantised base; leave --into out"):
        merge(tmp_path / "adapter", base, tmp_path / "again", into="quantised")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--as", "shira", "--out", str(tmp_path / "exported")]
    with pytest.raises(UserError, match="adapts Conv1D layers, which SHiRA does not; use `neuroada merge`"):
        export.main(arguments)
    assert not (tmp_path / "exported").exists()


def test_rows_are_not_selected(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its layers are Conv1D, whose neurons are columns; leave the choice to"):
        select(base, 3, tmp_path / "selection.safetensors", target_modules=["c_proj"])
