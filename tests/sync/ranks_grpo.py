"""GRPOTrainer on two ranks, each with an engine of its own, over a folder.

torchrun --nproc-per-node 2 tests/sync/ranks_grpo.py argument.json
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from datasets import Dataset
from sync_models import TARGETS, checkpoint_of, merged, plain
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from neuroada import NeuroAdaConfig
from neuroada.sync import FolderTransport
from neuroada.sync.trl import Rollouts


def many_letters(completions, **_):
    return [float(len(set(text))) for text in completions]


def main() -> None:
    argument = json.loads(Path(sys.argv[1]).read_text())
    model, out = Path(argument["model"]), Path(argument["out"])
    seen = []

    class Checked(Rollouts):
        def __call__(self, prompts, trainer):
            said = super().__call__(prompts, trainer)
            exact = merged(trainer.model)
            seen.append(all(param.equal(exact[name]) for name, param in checkpoint_of(self.engine).items()))
            return said

    trainer = GRPOTrainer(
        model=plain(model),
        reward_funcs=many_letters,
        args=GRPOConfig(
            output_dir=str(out), max_steps=3, per_device_train_batch_size=4, num_generations=4, beta=0.1,
            learning_rate=0.05, max_completion_length=6, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
            gradient_checkpointing=False, save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in ("12 + 3", "a", "the cat", "9")] * 8),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=NeuroAdaConfig(k=8, target_modules=TARGETS),
        rollout_func=Checked(plain(model), FolderTransport(out / "messages")),
    )  # fmt: skip
    trainer.train()
    (out / f"said-{dist.get_rank()}.json").write_text(json.dumps({"seen": seen, "ranks": dist.get_world_size()}))
    dist.barrier()
    os._exit(0)  # at Python's own exit torch's gloo threads abort now and then


if __name__ == "__main__":
    main()
