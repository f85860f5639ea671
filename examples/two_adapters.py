"""Two adapters on one base model: switched, disabled, and the base's bits as they were.

python examples/two_adapters.py models/tiny
"""

import sys

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from neuroada import NeuroAdaConfig

base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.arange(12)[None]
with torch.no_grad():
    untouched = base(ids).logits.clone()
targets = ["q_proj", "v_proj"]
model = get_peft_model(base, NeuroAdaConfig(k=2, target_modules=targets), adapter_name="first").eval()
model.add_adapter("second", NeuroAdaConfig(k=4, target_modules=targets))

with torch.no_grad():
    for name, param in model.named_parameters():
        if "neuroada_delta" in name:
            param.normal_(std=0.02)
    outputs = {}
    for adapter in ("first", "second"):
        model.set_adapter(adapter)
        outputs[adapter] = model(ids).logits
        print(f"{adapter}: furthest from the base by {(outputs[adapter] - untouched).abs().max():.4f}")
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, untouched)
    model.set_adapter("first")
    assert torch.equal(model(ids).logits, outputs["first"])
print("disabled: the base's logits to the bit")
