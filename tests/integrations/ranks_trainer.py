"""transformers' Trainer under ZeRO-2, ZeRO-3 or FSDP2 on CPU ranks, driven as it would be on GPUs.

    torchrun --nproc-per-node 2 tests/integrations/ranks_trainer.py arguments.json

with {"engine": "zero3", "model": FOLDER, "out": FOLDER}.

With use_cpu accelerate would train plain DDP, whatever the configuration. So use_cpu stays off, and the backend is said
to be gloo; for FSDP2 the device is said to be the CPU.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, training_args

from neuroada import NeuroAdaConfig, sharding

IDS = torch.randint(0, 200, (16, 12), generator=torch.Generator().manual_seed(0))
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def engine_options(engine: str, bf16: bool) -> dict:
    if engine == "fsdp2":
        blocks = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
        return {"fsdp": True, "fsdp_config": {"version": 2, **blocks}}
    stage = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
    if not bf16:  # else the configuration most users have: small parameters stay whole, weights are cast
        stage["stage3_param_persistence_threshold"] = 0
    return {"bf16": bf16, "deepspeed": {**DEEPSPEED, "bf16": {"enabled": "auto"}, "zero_optimization": stage}}


def pretend(engine: str) -> None:
    """accelerate shards by FSDP2 only what it takes for several GPUs."""
    # Not compiled for this: a build that is killed leaves a lock, on which later runs wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    kind = DistributedType.MULTI_GPU if engine == "fsdp2" else DistributedType.MULTI_CPU
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", kind)
    training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def main(engine: str, model: str, out: str, bf16: bool = False) -> None:
    pretend(engine)
    arguments = TrainingArguments(
        out, per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2, logging_steps=1, report_to=[], seed=0,
        save_steps=3, **engine_options(engine, bf16),
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if bf16 else torch.float32)
    tuned = get_peft_model(base, NeuroAdaConfig(k=4, task_type="CAUSAL_LM"))
    trainer = Trainer(tuned, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.train()
    layer = tuned.base_model.adapted_layers("default")[0]
    sharded = not sharding.is_whole(layer.base.stored)
    trainer.save_model(str(Path(out) / "saved"))
    if int(os.environ["RANK"]) == 0:
        curve = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        (Path(out) / "said.json").write_text(json.dumps({"curve": curve, "sharded": sharded}))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(**json.loads(Path(sys.argv[1]).read_text()))
