"""An adapter merged into a quantised folder: the codes stay, the model is what was trained, and trains further."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from neuroada.cli.merge import parse
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.evaluation.load import load
from neuroada.evaluation.source import Source
from neuroada.files import load_tensors
from neuroada.hf.quantised import pretrained_quantised, quantised_layers
from neuroada.offline.matrices import Repacked
from neuroada.offline.merge import merge
from neuroada.offline.quantise import quantise_folder
from neuroada.ops import pack_indices
from neuroada.ops.selection import select_top_k
from neuroada.quantised import FORMATS, PackedRows, Quantisation, QuantisedLinear
from neuroada.sources.tiny import make_tiny
from neuroada.training.trainer import train

K = 4
X = torch.arange(3, 40)[None]


def weight(rows: int = 24, inputs: int = 64) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("exact", [0, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_keep_their_codes_and_get_the_trained_values(name: str, exact: int, packed: bool) -> None:
    rows, w = PackedRows(Quantisation(name, exact), 64), weight()
    stored = rows.encode(w)
    idx = select_top_k(w, 3, "random", seed=1)  # some among the exact ones, some not
    delta = torch.randn(24, 3, generator=torch.Generator().manual_seed(2))
    given = stored if packed else w
    matrix = Repacked(rows, packed, (pack_indices(idx), delta))
    matrix.exact = count = matrix.needed([(0, given[:10]), (10, given[10:])])
    assert exact < count <= exact + 3
    new = torch.cat([matrix(0, given[:10]), matrix(10, given[10:])])
    wider = PackedRows(Quantisation(name, count), 64)
    columns, _ = wider.exact_entries(new)
    assert new.shape[1] == wider.row_bytes
    assert (columns.diff(dim=1) > 0).all()
    codes_and_scales = rows.row_bytes - 4 * exact
    assert new[:, :codes_and_scales].equal(stored[:, :codes_and_scales])
    expected = rows.decode(stored, torch.bfloat16)
    assert matrix.base.equal(expected.gather(1, idx))
    expected.scatter_(1, idx, (expected.gather(1, idx).float() + delta).bfloat16())
    assert wider.decode(new, torch.bfloat16).equal(expected)

    without = Repacked(rows, packed, None)
    assert without.needed([(0, given)]) == exact
    without.exact = count  # as other layers need
    assert wider.decode(without(0, given), torch.bfloat16).equal(rows.decode(stored, torch.bfloat16))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "tiny")
    LlamaForCausalLM.from_pretrained(folder / "tiny", dtype=torch.bfloat16).save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def packed(tiny: Path) -> Path:
    quantise_folder(tiny, tiny.parent / "packed", Quantisation("nf4", K))
    return tiny.parent / "packed"


def run(tiny: Path, name: str, *overrides: str) -> Path:
    output = tiny.parent / "runs" / name
    fields = [f"output_dir={output}", f"data_dir={tiny.parent / 'data'}", "train.max_steps=3", f"adapter.k={K}",
              "train.dtype=bf16", "engine.name=single", "optimizer.lr=0.05", *overrides]  # fmt: skip
    train(load_recipe("tiny_arithmetic", fields))
    return output / "adapter"


@pytest.fixture(scope="module")
def among_exact(tiny: Path, packed: Path) -> Path:
    """Trained on the exact entries."""
    return run(tiny, "among exact", f"model={packed}")


@pytest.fixture(scope="module")
def elsewhere(tiny: Path, packed: Path) -> Path:
    """Trained on other entries, of two modules a block."""
    return run(tiny, "elsewhere", f"model={packed}", "adapter.selection=reverse", "adapter.k=3",
               "adapter.target_modules=[q_proj, down_proj]")  # fmt: skip


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=X).logits


def over(base: Path, adapter: Path, exact: int = K) -> torch.Tensor:
    model = pretrained_quantised(AutoModelForCausalLM, str(base), torch.bfloat16, Quantisation("nf4", exact), "cpu")
    return logits(PeftModel.from_pretrained(model, str(adapter)))


def codes(folder: Path) -> dict[str, torch.Tensor]:
    quantisation = Quantisation.from_json(json.loads((folder / "config.json").read_text())["quantization_config"], "")
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_tensors(path)[0].items()}
    layers = quantised_layers(str(folder), quantisation)
    return {
        name: tensors[f"{name}.packed"][:, : rows.row_bytes - 4 * quantisation.exact] for name, rows in layers.items()
    }


def test_where_the_trained_entries_are_exact_already_only_values_change(
    tiny: Path, packed: Path, among_exact: Path, tmp_path: Path
) -> None:
    expected = over(packed, among_exact)
    done = merge(among_exact, packed, tmp_path / "merged", into="quantised", verify=True)
    assert done["into"] == "quantised weights, nf4, 4 exact entries a row"
    assert done["exact_before"] == K
    assert done["bytes"] == sum(t.nbytes for t in load_tensors(packed / "model.safetensors")[0].values())
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)).equal(expected)
    assert not logits(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)).equal(expected)


def test_elsewhere_they_join_the_exact_ones_in_every_layer(packed: Path, elsewhere: Path, tmp_path: Path) -> None:
    expected = over(packed, elsewhere)
    done = merge(elsewhere, packed, tmp_path / "merged", into="quantised")
    assert done["into"] == "quantised weights, nf4, 7 exact entries a row"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert sum(isinstance(module, QuantisedLinear) for module in model.modules()) == 14
    assert logits(model).equal(expected)
    assert logits(model.dequantize()).equal(expected)
    before, after = codes(packed), codes(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)
    evaluated, _ = load(Source(str(tmp_path / "merged")), "bf16", torch.device("cpu"))
    assert logits(evaluated).equal(expected)
    dense = merge(elsewhere, packed, tmp_path / "dense", verify=True)
    assert dense["verified"] is True
    assert logits(LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)).equal(expected)


def test_it_trains_further_and_is_merged_again(tiny: Path, packed: Path, elsewhere: Path, tmp_path: Path) -> None:
    merge(elsewhere, packed, tmp_path / "merged", into="quantised")
    again = run(tiny, "again", f"model={tmp_path / 'merged'}")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    tuned = PeftModel.from_pretrained(loaded, str(again))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    with layer.base.own_rows() as (_, values):  # exact entries are no more the largest ones
        assert layer.neuroada_idx["default"].equal(pack_indices(select_top_k(values, K, "magnitude")))
    merge(again, tmp_path / "merged", tmp_path / "twice", into="quantised", verify=True)
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", dtype=torch.bfloat16)
    assert logits(twice).equal(logits(tuned))
    with pytest.raises(UserError, match=r"was trained on a base nf4, 7 exact entries a row"):
        merge(again, packed, tmp_path / "refused", into="quantised")


def test_over_the_original_checkpoint_it_is_quantised_on_the_way(
    tiny: Path, packed: Path, among_exact: Path, elsewhere: Path, tmp_path: Path
) -> None:
    for name, adapter in (("among", among_exact), ("elsewhere", elsewhere)):
        merge(adapter, tiny, tmp_path / name, into="quantised")
        merge(adapter, packed, tmp_path / f"{name} packed", into="quantised")
        ours, theirs = (load_tensors(tmp_path / folder / "model.safetensors")[0] for folder in (name, f"{name} packed"))
        assert ours.keys() == theirs.keys()
        assert all(ours[tensor].equal(theirs[tensor]) for tensor in ours)


def test_what_does_not_fit_is_told_in_a_line(tiny: Path, packed: Path, among_exact: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", (among_exact / "adapter_config.json").read_text()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in among_exact.iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    named = json.loads(text)
    (adapter / "adapter_config.json").write_text(json.dumps(named | {"base_fingerprint": "nf4:4:0123456789abcdef"}))
    with pytest.raises(UserError, match=r"trained on other base weights \(base_fingerprint nf4:4:0123456789abcdef"):
        merge(adapter, packed, out, into="quantised")
    (adapter / "adapter_config.json").write_text(json.dumps(named | {"base_fingerprint": None}))
    with pytest.raises(UserError, match=r"--into quantised: .* trained over an unquantised base"):
        merge(adapter, tiny, out, into="quantised")
    wide = make_tiny(tmp_path / "wide", hidden=128)
    with pytest.raises(UserError, match=r"has another size than the adapter's"):
        merge(among_exact, wide, out, into="quantised")
    with pytest.raises(UserError, match=r"--verify: --into original makes another model"):
        merge(among_exact, tiny, out, into="original", verify=True)
    assert not out.exists()
    with pytest.raises(UserError, match="--into"):
        parse(["--adapter", str(among_exact), "--out", str(out), "--into", "int4"])
