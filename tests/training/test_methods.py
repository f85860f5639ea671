"""Every method by the same loop, and each against its textbook form."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_runs import TinyRuns, assert_same_curve, losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from neuroada.config.recipe import Recipe, load_recipe
from neuroada.data.mixing import Order
from neuroada.errors import UserError
from neuroada.hf.loading import load_config, load_pretrained, load_tokenizer
from neuroada.methods import make_method
from neuroada.methods.base import WHOLE
from neuroada.planning.step import record_step
from neuroada.registry import METHODS as METHOD_CLASSES
from neuroada.tasks.data import load_examples
from neuroada.tasks.encode import encode
from neuroada.tasks.hold_out import hold_out
from neuroada.tasks.table import get_task
from neuroada.training.schedule import lr_at
from neuroada.training.trainer import train

METHODS = ("neuroada", "lora", "dora", "shira", "random_entries", "supertuning", "masked", "full")


@pytest.fixture(scope="module")
def make_recipe(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("methods")

    def make(name: str, *overrides: str) -> Recipe:
        fields = [f"model={tiny}", f"output_dir={folder / name}", f"data_dir={folder / 'data'}", "engine.name=single",
                  "train.micro_batch_size=8", "train.max_steps=6", "adapter.rank=2", "adapter.sparsity=0.95",
                  "optimizer.schedule=constant", *overrides]  # fmt: skip
        return load_recipe("tiny_arithmetic", fields)

    return make


@pytest.fixture(scope="module")
def curve(make_recipe):
    """The losses of a run of each method, trained once."""
    known: dict[str, tuple[Recipe, list[float]]] = {}

    def run(method: str, *overrides: str) -> tuple[Recipe, list[float]]:
        if method not in known:
            recipe = make_recipe(method, f"adapter.method={method}", *overrides)
            train(recipe)
            lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
            known[method] = recipe, [json.loads(line)["loss"] for line in lines]
        return known[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_tells_what_it_trains(curve, method: str) -> None:
    recipe, found = curve(method)
    assert len(found) == 6
    assert min(found[3:]) < found[0] - 0.05
    folder = Path(recipe.output_dir)
    assert (folder / make_method(recipe).folder).is_dir()
    facts = json.loads((folder / "run.json").read_text())
    rows = sum(64 + 32 + 32 + 64 + 128 + 128 + 64 for _ in range(2))  # of the seven projections, in two layers
    expected = {"neuroada": 4 * rows, "masked": 4 * rows, "random_entries": 4 * rows, "full": facts["parameters"]}
    assert facts["trainable"] == expected.get(method, facts["trainable"]) > 0


def test_masked_tuning_is_neuroada_written_the_dense_way(curve) -> None:
    masked, found = curve("masked")
    sparse, expected = curve("neuroada")
    assert found == pytest.approx(expected, rel=1e-5)
    model = load_file(Path(masked.output_dir) / "model" / "model.safetensors")
    base = load_file(Path(masked.model) / "model.safetensors")
    adapter = load_file(Path(sparse.output_dir) / "adapter" / "adapter_model.safetensors")
    deltas = {key: value for key, value in adapter.items() if key.endswith("delta")}
    for key, delta in deltas.items():
        name = key.removeprefix("base_model.model.").replace(".neuroada_delta", ".weight")
        change = model[name] - base[name]
        assert (change != 0).sum(1).max() <= 4  # outside the mask not a bit moved
        assert change.sum(1).numpy() == pytest.approx(delta.sum(1).numpy(), abs=1e-5)
    untouched = [name for name in base if "proj" not in name]
    assert untouched and all(model[name].equal(base[name]) for name in untouched if name in model)


def test_full_tuning_is_a_plain_loop(curve) -> None:
    recipe, trained = curve("full")
    tokenizer, task = load_tokenizer(recipe.model), get_task("arithmetic")
    data = encode(load_examples(task, "train", recipe.data_dir), task, tokenizer, recipe.train.max_length)
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    found = []
    for step in range(2):
        total = torch.zeros(())
        chosen = Order((len(data),), recipe.train.seed).batch(step, 8)
        for i in chosen:
            ids = torch.tensor(data.tokens(i)).long()[None]
            labels = ids.clone()
            labels[:, : data.answer_start(i)] = -100
            total = total + model(input_ids=ids, labels=labels).loss * int(data.num_answer_tokens[i])
        loss = total / int(data.num_answer_tokens[chosen].sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr_at(step, 6, recipe.optimizer)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert trained[:2] == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_the_model_that_was_trained(make_recipe, method: str) -> None:
    from peft import PeftModel

    recipe = make_recipe(f"saved-{method}", f"adapter.method={method}", "train.dtype=fp32")
    trained = make_method(recipe)
    base = load_pretrained(AutoModelForCausalLM, recipe.model, torch.float32)
    model = trained.attach(base, "CAUSAL_LM")
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.05 * torch.randn_like(param))
    assert trained.trainable(model) > 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids).logits
    folder = Path(recipe.output_dir)
    trained.save(model, folder / trained.folder)
    if trained.folder == "model":
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    else:
        base = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    with torch.no_grad():
        assert loaded(ids).logits.numpy() == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.parametrize("method", ["shira", "random_entries", "supertuning", "dora"])
def test_a_method_is_refused_where_it_cannot_run(make_recipe, monkeypatch, method: str) -> None:
    """Every method of ours runs everywhere: these as if they did not."""
    monkeypatch.setattr(METHOD_CLASSES.load(method), "strategies", WHOLE)
    made = make_method(make_recipe("refused", f"adapter.method={method}"))
    made.check("zero2")
    with pytest.raises(UserError, match=f"adapter.method = {method}: does not run under zero3; use single"):
        made.check("zero3")


@pytest.mark.parametrize("method", ["full", "masked", "bitfit"])
def test_whole_weights_and_a_classifier_are_refused_under_fsdp2(make_recipe, method: str) -> None:
    """Its first values would be nobody's."""
    make_method(make_recipe("refused", f"adapter.method={method}")).check("fsdp2")
    with pytest.raises(UserError, match=f"adapter.method = {method}: does not run under fsdp2 with task glue/sst2"):
        make_method(make_recipe("refused", f"adapter.method={method}", "task=glue/sst2")).check("fsdp2")


def test_a_mask_and_weight_decay_do_not_go_together(make_recipe) -> None:
    made = make_method(make_recipe("decay", "adapter.method=masked", "optimizer.weight_decay=0.1"))
    with pytest.raises(UserError, match=r"optimizer.weight_decay = 0\.1"):
        made.check("single")


def test_a_mask_over_a_tied_weight_is_refused(make_recipe) -> None:
    recipe = make_recipe("tied", "adapter.method=masked", "adapter.target_modules=[lm_head]")
    base = load_pretrained(AutoModelForCausalLM, recipe.model, torch.float32)
    with pytest.raises(UserError, match="lm_head shares its weight"):
        make_method(recipe).attach(base, "CAUSAL_LM")


def test_the_count_of_trainable_parameters_is_one(make_recipe, curve) -> None:
    """What a run says at its start, what run.json holds and what a plan counts are the same number."""
    for method in METHODS:
        recipe, _ = curve(method)
        planned = record_step(recipe, load_config(recipe.model), accumulating=False).trainable
        assert planned == json.loads((Path(recipe.output_dir) / "run.json").read_text())["trainable"], method


def test_held_out_questions_are_never_trained_on() -> None:
    examples = [{"instruction": f"question {i % 50}", "output": str(i)} for i in range(80)]
    train_rows, validation, test = hold_out(examples, 10)
    questions = [{row["instruction"] for row in part} for part in (train_rows, validation, test)]
    assert [len(part) for part in questions] == [30, 10, 10]
    assert len(set.union(*questions)) == 50
    assert hold_out(examples, 0) == (examples, [], [])
    assert hold_out(examples, 10) == (train_rows, validation, test)
    with pytest.raises(UserError, match=r"train.held_out = 25"):
        hold_out(examples, 25)


SHORT = ["adapter.rank=2", "adapter.sparsity=0.95", "train.max_steps=4", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def fields_of(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The fields of a method's short run; BitFit's model is the tiny one with biases."""
    folder = tmp_path_factory.mktemp("models") / "biased"
    torch.manual_seed(0)
    biased = AutoModelForCausalLM.from_pretrained(tiny, attention_bias=True, mlp_bias=True)
    for name, param in biased.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param, std=0.1)
    biased.save_pretrained(folder)
    load_tokenizer(str(tiny)).save_pretrained(folder)

    def fields(method: str) -> list[str]:
        longer = ["train.max_steps=8", "checkpoint.keep=4"] if method in ("shira", "supertuning", "dora") else []
        scope = ["adapter.random_scope=block"] if method == "random_entries" else []
        model = [f"model={folder}"] if method == "bitfit" else []
        return [f"adapter.method={method}", *SHORT, *longer, *scope, *model]

    return fields


@pytest.fixture(scope="module")
def sharded(tiny_runs: TinyRuns, fields_of: Callable[[str], list[str]]) -> dict[str, dict[str, Path]]:
    """method -> engine -> its run, under every strategy the method names; of NeuroAda: test_engines_and_resume.py."""
    found: dict[str, dict[str, Path]] = {}
    for method in (*METHODS[1:], "bitfit"):
        for engine in METHOD_CLASSES.load(method).strategies:
            if engine not in ("zero0", "zero1"):  # for what trains and how, the same as zero2
                ranks, name = 1 if engine == "single" else 2, f"{method}-{engine}"
                found.setdefault(method, {})[engine] = tiny_runs.add(name, engine, ranks, *fields_of(method))
    # PEFT rounds LoRA's first values to the base's dtype, and of Super-Tuning's largest entries many are equal.
    for method in ("lora", "dora", "supertuning"):
        for engine, ranks in (("single", 1), ("zero3", 2), ("fsdp2", 2)):
            name, fields = f"{method}-bf16", [*fields_of(method), "train.dtype=bf16"]
            found.setdefault(name, {})[engine] = tiny_runs.add(f"{name}-{engine}", engine, ranks, *fields)
    tiny_runs.run()
    return found


def result(folder: Path) -> dict[str, torch.Tensor]:
    """What a run saved."""
    found = folder / "adapter" / "adapter_model.safetensors"
    return load_file(found if found.is_file() else folder / "model" / "model.safetensors")


def test_sharded_or_not_a_method_learns_the_same(sharded: dict[str, dict[str, Path]]) -> None:
    for folders in sharded.values():
        expected = losses(folders["single"])
        for folder in folders.values():
            relative = 2e-3 if "bf16" in folder.name else 1e-5
            assert_same_curve(losses(folder), expected, relative, name=folder.name)


def test_sharded_or_not_a_method_saves_the_same(sharded: dict[str, dict[str, Path]]) -> None:
    """The whole, gathered from its shards; full tuning's largest step is 1e-2, and Adam's first ones are signs."""
    for method in (*METHODS[1:], "bitfit"):
        expected = result(sharded[method]["single"])
        for engine, folder in sharded[method].items():
            found = result(folder)
            assert found.keys() == expected.keys(), (method, engine)
            for name, tensor in expected.items():
                assert found[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-4), (method, engine, name)


def test_a_sharded_method_s_checkpoint_goes_on_elsewhere(
    tiny_runs: TinyRuns, sharded: dict, fields_of: Callable[[str], list[str]]
) -> None:
    moves = {"lora": ("single", 1), "dora": ("single", 1), "masked": ("zero3", 2), "full": ("zero3", 3),
             "bitfit": ("zero3", 2), "shira": ("zero3", 3), "random_entries": ("single", 1),
             "supertuning": ("zero3", 3)}  # fmt: skip
    moved = {}
    for method, (engine, ranks) in moves.items():
        source = sharded[method]["fsdp2"]
        folder = moved[method] = tiny_runs.add(f"{method}-moved", engine, ranks, *fields_of(method))
        shutil.copytree(source / "checkpoints" / "step-000002", folder / "checkpoints" / "step-000002")
        shutil.copy(source / "metrics.jsonl", folder)
    tiny_runs.run()
    for method, folder in moved.items():
        assert_same_curve(losses(folder), losses(sharded[method]["single"]), name=method)
