"""TRL's GRPOTrainer with our rollouts: what generates is what is trained, and the reference is the base."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_source
from distributed_runs import run_ranks
from sync_models import TARGETS, bits, change, checkpoint_of, merged, plain, same_bits, tuned
from test_vllm import PackedModel, assert_holds
from transformers import AutoTokenizer

from neuroada import NeuroAdaConfig
from neuroada.errors import UserError
from neuroada.sync import Pipe
from neuroada.sync.trl import sync_colocated_vllm

STEPS = 4


def test_rollouts_are_the_policy_s(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every generation the engine's weights are the merged trainer's; and TRL's reference is the base to the bit."""
    trl = pytest.importorskip("trl", reason="the extra grpo (TRL) is not installed")
    from datasets import Dataset

    from neuroada.sync.trl import Rollouts

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    engine, seen = plain(base_folder), []
    base = checkpoint_of(engine)

    class Checked(Rollouts):
        def __call__(self, prompts, trainer):
            said = super().__call__(prompts, trainer)
            exact = merged(trainer.model)
            seen.append(all(param.equal(exact[name]) for name, param in checkpoint_of(self.engine).items()))
            assert len(said["completion_ids"]) == len(prompts)
            with trainer.model.disable_adapter():
                reference = checkpoint_of(trainer.model.get_base_model())
            assert all(
                param.equal(base[name.replace(".base_layer", "")])
                for name, param in reference.items()
                if "neuroada_" not in name
            )
            return said

    def many_letters(completions, **_):
        """Something that random text scores on."""
        return [float(len(set(text))) for text in completions]

    trainer = trl.GRPOTrainer(
        model=plain(base_folder),
        reward_funcs=many_letters,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, num_generations=4, beta=0.1,
            learning_rate=0.05, max_completion_length=6, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
            gradient_checkpointing=False, save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in ("12 + 3", "a", "the cat", "9")] * 8),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
        peft_config=NeuroAdaConfig(k=8, target_modules=TARGETS),
        rollout_func=Checked(engine),
    )  # fmt: skip
    trainer.train()
    assert seen == [True] * STEPS
    assert trainer.ref_model is None
    assert not same_bits(bits(engine), {name: param.view(torch.uint8) for name, param in base.items()})


def test_two_ranks_over_a_folder(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank sends its share, and each rank's engine has all of it before it generates."""
    pytest.importorskip("trl", reason="the extra grpo (TRL) is not installed")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    run_ranks(2, "sync/ranks_grpo.py", {"model": str(base_folder), "out": str(tmp_path)}, tmp_path)
    for rank in range(2):
        said = json.loads((tmp_path / f"said-{rank}.json").read_text())
        assert said == {"seen": [True] * 3, "ranks": 2}


def test_colocated_vllm_is_synced_by_patches(base_folder, monkeypatch) -> None:
    """With stand-ins of TRL's VLLMGeneration and vLLM's engine, by the attributes that TRL 1.16 itself uses."""
    vllm_source.install(monkeypatch, vllm_source.stand_in_patches())
    trainer_model, base = tuned(base_folder), checkpoint_of(plain(base_folder))
    worker, resets = PackedModel(base, 0, 1), []
    engine = SimpleNamespace(
        model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=worker))),
        model_config=SimpleNamespace(model=str(base_folder)),
    )
    llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: resets.append(1))
    generation = SimpleNamespace(llm=llm, mode="colocate", enable_sleep_mode=False)
    accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
    trainer = SimpleNamespace(vllm_generation=generation, model=trainer_model, accelerator=accelerator)
    sync = sync_colocated_vllm(trainer)
    for step in range(3):
        change(trainer_model, step)
        generation.sync_weights()
        assert_holds(worker, merged(trainer_model))
    assert len(resets) == 3
    assert isinstance(sync.transport, Pipe)
    generation.mode = "server"
    with pytest.raises(UserError, match="vllm_mode = server"):
        sync_colocated_vllm(trainer)
