"""launch/evaluate.py as a user starts it, on one process and by torchrun."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from neuroada.errors import UserError
from neuroada.evaluation import source as source_module
from neuroada.evaluation.source import Source, resolve_tasks

ROOT = Path(__file__).parents[2]
EVALUATE = str(ROOT / "launch" / "evaluate.py")


def launch(*arguments: object, ranks: int = 1, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [*command, EVALUATE, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def generations(out: Path, task: str = "boolq") -> list[str]:
    return [json.loads(line)["generation"] for line in (out / "predictions" / f"{task}.jsonl").open()]


@pytest.fixture(scope="module")
def lora(tmp_path_factory, model_dir) -> Path:
    """A run's folder with a recipe and a LoRA adapter that does something."""
    run = tmp_path_factory.mktemp("runs") / "tiny_lora"
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(run / "adapter")
    (run / "recipe.yaml").write_text("task: math\n")
    return run


def test_any_number_of_ranks_gives_the_same_bytes(model_dir, data_dir, tmp_path):
    outputs = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        command = ("--model", model_dir, "--tasks", "boolq,AddSub", "--data-dir", data_dir, "--out", out, "--limit", 12)
        result = launch(*command, "--batch-tokens", 1500, "--json", ranks=ranks)
        assert json.loads(result.stdout) == json.loads((out / "results.json").read_text())
        assert not (out / "predictions" / ".parts").exists()
        files = ("predictions/AddSub.jsonl", "predictions/boolq.jsonl", "results.json")
        outputs.append([(out / name).read_bytes() for name in files])
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(generations(tmp_path / "3", "AddSub"))) > 6


def test_a_killed_evaluation_resumes_on_other_ranks(model_dir, data_dir, tmp_path):
    command = ["--model", model_dir, "--tasks", "AddSub", "--data-dir", data_dir, "--batch-tokens", 700]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch(*command, "--out", whole)
    process = subprocess.Popen(
        [sys.executable, EVALUATE, *map(str, command), "--out", str(cut)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    part = cut / "predictions" / ".parts" / "rank0.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.is_file() and part.read_text().count("\n") >= 3):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    done = part.read_text().count("\n")
    result = launch(*command, "--out", cut, ranks=2)
    assert (cut / "predictions" / "AddSub.jsonl").read_bytes() == (whole / "predictions" / "AddSub.jsonl").read_bytes()
    assert 3 <= done < 12 and "generating" in result.stderr


def test_an_adapter_is_merged_and_lands_in_its_run(lora, model_dir, data_dir, tmp_path):
    command = ("--tasks", "boolq", "--data-dir", data_dir, "--limit", 8)
    table = launch("--adapter", lora / "adapter", *command, cwd=tmp_path).stdout
    assert "boolq" in table and "baseline" in table
    results = json.loads((lora / "results.json").read_text())
    assert results["adapter"] == str(lora / "adapter") and results["model"] == str(model_dir)
    assert results["limit"] == 8
    assert results["tasks"]["boolq"]["unseen"]["n"] == 8  # the recipe trained on math, whose file is there
    launch("--model", model_dir, *command, cwd=tmp_path)
    tuned, base = generations(lora), generations(tmp_path / "results" / "tiny")
    merged = tmp_path / "merged"
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    PeftModel.from_pretrained(model, str(lora / "adapter")).merge_and_unload().save_pretrained(merged)
    for file in model_dir.glob("tokenizer*"):
        (merged / file.name).write_bytes(file.read_bytes())
    launch("--model", merged, *command, "--out", tmp_path / "again")
    assert tuned != base and tuned == generations(tmp_path / "again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "AddSub"], "--model DIR or --adapter DIR"),
        (["--tasks", "AddSub", "--model", "a", "--adapter", "b"], "--model DIR or --adapter DIR"),
        (["--tasks", "AddSub", "--model", "nowhere"], "'nowhere' is no folder"),
        (["--tasks", "AddSub", "--adapter", "MODEL"], "has no adapter_config.json"),
        (["--tasks", "AddSub", "--model", "ADAPTER"], "give it as --adapter"),
        (["--tasks", "AdSub", "--model", "MODEL"], "did you mean AddSub"),
        (["--tasks", "", "--model", "MODEL"], "names no task"),
        (["--tasks", "glue/sst2", "--model", "MODEL"], "no such file, the validation set of task glue/sst2"),
        (["--tasks", "glue/sst2,AddSub", "--model", "MODEL"], "glue/sst2 is scored on that task alone"),
        (["--tasks", "AddSub", "--model", "MODEL", "--limit", "0"], "limit: 0"),
        (["--tasks", "AddSub", "--model", "MODEL", "--limit", "x"], "invalid int value"),
        (["--tasks", "gsm8k", "--model", "MODEL"], "no such file"),
        (["--tasks", "AddSub", "--model", "MODEL", "--base-model", "b"], "base-model"),
        (["--tasks", "AddSub", "--adapter", "ADAPTER", "--base-model", "gone"], "base-model: 'gone'"),
        (["--tasks", "AddSub", "--model", "MODEL", "--backend", "vllm"], "vllm is not installed"),
        (["--model", "MODEL"], "--tasks"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, model_dir, lora, data_dir, tmp_path):
    places = {"MODEL": model_dir, "ADAPTER": lora / "adapter"}
    arguments = [places.get(argument, argument) for argument in arguments]
    result = launch(*arguments, "--data-dir", data_dir, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_model(lora, data_dir, tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    arguments = ("--adapter", lora / "adapter", "--base-model", tmp_path / "other")
    result = launch(*arguments, "--tasks", "AddSub", "--data-dir", data_dir, check=False)
    assert result.returncode == 2 and "does not fit" in result.stderr and "Traceback" not in result.stderr


def test_help_imports_nothing_heavy():
    code = f"import sys, runpy; sys.argv = ['evaluate.py', '--help']; runpy.run_path({EVALUATE!r}, run_name='__main__')"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); {code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--adapter DIR" in result.stdout and result.stderr == "False\n"


def test_suites_stand_for_their_tasks():
    math = [task.name for task in resolve_tasks(["math"])]
    assert sorted(math) == sorted(["MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps"])
    assert len(resolve_tasks(["commonsense", "boolq"])) == 8
    assert len(resolve_tasks(["commonsense", "commonsense_15k"])) == 9
    assert [task.name for task in resolve_tasks(["boolq", "arithmetic", "boolq"])] == ["boolq", "arithmetic"]


def test_where_results_go(lora, model_dir):
    source = Source.from_arguments(None, str(lora / "adapter"), None)
    assert source.default_out() == lora and source.trained_on == "math" and source.model == str(model_dir)
    assert Source.from_arguments(str(model_dir), None, None).default_out() == Path("results/tiny")


def test_identity_follows_the_weights(lora):
    source = Source.from_arguments(None, str(lora / "adapter"), None)
    before = source.identity()
    weights = lora / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert source.identity() != before
    weights.write_bytes(content)
    assert source.identity() == before


def test_an_adapter_without_a_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="base_model_name_or_path is missing"):
        Source.from_arguments(None, str(tmp_path), None)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Source.from_arguments(None, str(tmp_path), None)


def test_vllm_decodes_the_merged_model(lora, model_dir, data_dir, tmp_path, monkeypatch, tokenizer):
    from neuroada.evaluation.evaluate import evaluate_backend
    from neuroada.evaluation.vllm_backend import VllmBackend

    seen: dict = {}

    class LLM:
        def __init__(self, model: str, dtype: str) -> None:
            seen.update(
                folder=Path(model), weights=AutoModelForCausalLM.from_pretrained(model).state_dict(), dtype=dtype
            )
            config = types.SimpleNamespace(max_model_len=768)
            self.llm_engine = types.SimpleNamespace(model_config=config)

        def generate(self, prompts, parameters):
            seen.update(parameters=vars(parameters), prompts=prompts)
            ids = tokenizer("the correct answer is true")["input_ids"]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)]) for _ in prompts]

    fake = types.ModuleType("vllm")
    vars(fake).update(LLM=LLM, SamplingParams=lambda **given: types.SimpleNamespace(**given), __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    source = Source.from_arguments(None, str(lora / "adapter"), None)
    tasks = resolve_tasks(["boolq"])
    with VllmBackend(source, "auto") as backend:
        results = evaluate_backend(
            backend,
            tokenizer,
            tasks,
            data_dir,
            tmp_path,
            limit=None,
            names={"model": "m", "adapter": "a"},
            trained_on=None,
            identity=source.identity(),
        )
    assert results["tasks"]["boolq"]["published"] == results["tasks"]["boolq"]["baseline"] == 20 / 30
    assert seen["parameters"] == {"temperature": 0.0, "max_tokens": 32}
    assert len(seen["prompts"]) == 30 and seen["prompts"][0]["prompt_token_ids"]
    base = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    changed = [name for name in base if not torch.equal(base[name], seen["weights"][name])]
    assert changed and all("q_proj" in name or "down_proj" in name for name in changed)
    assert not seen["folder"].exists()


def test_bf16_where_the_device_has_none(model_dir, monkeypatch):
    from neuroada.evaluation.load import load

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 has no bf16"):
        load(Source(str(model_dir)), "bf16", torch.device("cuda", 0))


def test_source_module_is_light():
    code = f"import sys; import {source_module.__name__}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
