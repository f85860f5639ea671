"""Private names of other libraries that this package uses: each exists, and each is in docs/private_apis.md.

A test here fails by name when a release takes one away; the page says why it is used and what would replace it.
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# name -> (where, why; what replaces it)
PRIVATE = {
    "torch._subclasses.fake_tensor.FakeTensorMode": (
        "planning/step.py",
        "runs a real training step without storage; torch has no public name for it",
    ),
    "torch.utils._python_dispatch.TorchDispatchMode": (
        "planning/timeline.py",
        "sees every tensor that an operator makes; the base of torch's own documented modes",
    ),
    "torch.utils._pytree.tree_iter": (
        "planning/timeline.py",
        "the tensors in an operator's result, as torch walks them",
    ),
    "torch.UntypedStorage._cdata": (
        "planning/timeline.py",
        "tells one storage from another; data_ptr is 0 for fake ones",
    ),
    "torch.nn.Module._parameters": (
        "adapter, planning",
        "a parameter without ZeRO-3's gathering look-up; swapping a parameter's tensor in a plan",
    ),
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": (
        "sharding/dtensor.py",
        "which rows of a DTensor are this rank's",
    ),
    "torch.ops.aten._embedding_bag_per_sample_weights_backward": (
        "ops/sampled_gradient.py",
        "the sampled gradient on a CPU without a compiler; the public one needs autograd, off in a backward",
    ),
    "transformers.PreTrainedModel._no_split_modules": (
        "engines/fsdp2.py",
        "what a model's blocks are; accelerate's own policies read the same",
    ),
    "peft.tuners.tuners_utils.BaseTuner._create_and_replace": ("adapter/model.py", "the hook every tuner overrides"),
    "peft.tuners.tuners_utils.BaseTuner._replace_module": ("adapter/model.py", "as above; a classifier has no weight"),
    "peft.tuners.tuners_utils.BaseTuner._prepare_model": ("adapter/model.py", "checks before a layer is replaced"),
    "peft.tuners.tuners_utils.BaseTuner._get_adapter_state_dict": ("adapter/model.py", "what an adapter's file holds"),
    "peft.tuners.tuners_utils._maybe_include_all_linear_layers": (
        "adapter/model.py",
        "what PEFT takes all-linear for, before packed layers are added",
    ),
    "transformers.quantizers.HfQuantizer._process_model_before_weight_loading": (
        "hf/quantizer.py",
        "the hook every quantizer overrides",
    ),
    "transformers.quantizers.HfQuantizer._dequantize": (
        "hf/quantizer.py",
        "the hook of model.dequantize()",
    ),
    "peft.tuners.tuners_utils.BaseTuner._remap_adapter_state_dict_for_load": (
        "adapter/model.py",
        "an adapter's tensors before PEFT copies them into the model: where a damaged file is refused",
    ),
    "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters": (
        "hf/adapters_off.py",
        "the layers' flag alone; the public switch also turns requires_grad off, under the engines' gradient hooks",
    ),
    "deepspeed.ops.__compatible_ops__": (
        "engines/deepspeed.py",
        "keeps a start on CPU from compiling an operator of inference (0.19.8)",
    ),
}
ATTRIBUTES = {
    "ds_id": "sharding/zero3.py",
    "ds_shape": "sharding/zero3.py",
    "ds_tensor": "sharding/zero3.py",
    "ds_process_group": "sharding/zero3.py",
    "convert_to_zero_parameters": "sharding/zero3.py",
}
"""What DeepSpeed hangs on a partitioned parameter; tests/sharding runs on real ones."""


@pytest.mark.parametrize("name", PRIVATE)
def test_it_exists(name: str) -> None:
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        break
    if name.endswith("Module._parameters"):
        found, count, parts = found.Module(), 2, ["", "", "_parameters"]  # type: ignore[attr-defined]
    for part in parts[count:]:
        found = getattr(found, part)


def test_no_other_private_module_is_imported() -> None:
    known = {name.rpartition(".")[0] for name in PRIVATE} | set(PRIVATE)
    pattern = re.compile(r"^\s*(?:from|import) ((?:torch|transformers|peft|deepspeed|accelerate|datasets)[\w.]*)", re.M)
    for path in (ROOT / "neuroada").rglob("*.py"):
        for module in pattern.findall(path.read_text()):
            private = any(part.startswith("_") for part in module.split("."))
            assert not private or module in known, f"{path.relative_to(ROOT)} imports {module}: list it here"


def test_the_page_lists_them() -> None:
    page = (ROOT / "docs" / "private_apis.md").read_text()
    for name, (where, why) in PRIVATE.items():
        assert f"| `{name}` | {where} | {why} |" in page
    for name, where in ATTRIBUTES.items():
        assert f"| `{name}` | {where} |" in page
