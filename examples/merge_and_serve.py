"""Merge an adapter into its base, save an ordinary checkpoint, and generate from it with transformers alone.

python examples/merge_and_serve.py runs/quickstart/adapter models/quickstart "12 + 34 ="
"""

import sys
from pathlib import Path

from transformers import pipeline

from neuroada.hf.tensor_files import resolve
from neuroada.offline.merge import base_of, merge

adapter, out, prompt = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if not out.exists():
    source, revision = base_of(adapter)
    print(merge(adapter, resolve(source, "base model", revision), out))
print(pipeline("text-generation", model=str(out))(prompt, max_new_tokens=16, do_sample=False)[0]["generated_text"])
