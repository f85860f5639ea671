"""NeuroAda as any PEFT method, on a causal language model of yours.

python examples/peft_in_ten_lines.py models/tiny
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroada import NeuroAdaConfig

source = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(source)
base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
model = get_peft_model(base, NeuroAdaConfig(k=4, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()

batch = tokenizer("Two and two make four.", return_tensors="pt")
optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
for step in range(10):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: {loss.item():.4f}")

model.save_pretrained("runs/peft_in_ten_lines")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), "runs/peft_in_ten_lines")
with torch.no_grad():
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
print("saved and loaded: the same logits")
