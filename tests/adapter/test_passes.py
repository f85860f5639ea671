"""No pass is ever visible to another: threads, interruptions, checkpointing, hooks, offloading, autocast."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from tiny_models import ATTENTION, X, assert_base_is_whole, logits, make_base, train_a_little
from torch import nn

from neuroada import NeuroAdaConfig
from neuroada.errors import UserError

TARGETS = [*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"]
FEW, MANY = X[:1, :4], X
"""Tokens that go through the kernel for decoding, and through a scratch weight."""


@pytest.fixture
def base() -> nn.Module:
    return make_base()


@pytest.fixture
def tuned(base) -> PeftModel:
    config = NeuroAdaConfig(k=5, target_modules=TARGETS, task_type="CAUSAL_LM")
    return train_a_little(get_peft_model(copy.deepcopy(base), config)).eval()


def run_threads(jobs: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("gradients", [False, True])
def test_threads_that_share_a_model(base, tuned, ids: torch.Tensor, gradients: bool) -> None:
    expected = logits(tuned, ids)
    wrong: list[float] = []

    def forwards() -> None:
        with torch.set_grad_enabled(gradients):
            for _ in range(100):
                found = tuned(input_ids=ids).logits.detach()
                if not found.equal(expected):
                    wrong.append((found - expected).abs().max().item())

    run_threads([forwards] * 4)
    assert wrong == []
    assert_base_is_whole(tuned.unload(), base)


def test_threads_beside_one_that_trains(base, tuned) -> None:
    """Three read one adapter while a fourth trains another one of the same base, layer for layer."""
    learner = copy.copy(tuned)  # not the model: its adapter's tensors are the same
    expected = logits(tuned)
    curve: list[list[float]] = []
    wrong: list[int] = []

    def backward() -> None:
        losses = []
        for _ in range(100):
            loss = learner(input_ids=X, labels=X).loss
            gradients = torch.autograd.grad(loss, [p for p in learner.parameters() if p.requires_grad])
            losses.append(sum(gradient.abs().sum().item() for gradient in gradients))
        curve.append(losses)

    def forwards() -> None:
        for _ in range(100):
            with torch.no_grad():
                wrong.extend([1] * (not tuned(input_ids=X).logits.equal(expected)))

    backward()
    run_threads([forwards, forwards, forwards, backward])
    assert wrong == []
    assert curve[1] == curve[0] and len(set(curve[1])) == 1
    assert_base_is_whole(tuned.unload(), base)


def test_threads_beside_passes_that_fail(base, tuned) -> None:
    """An exception inside a layer, at any depth, leaves nothing behind and disturbs nobody."""
    expected = logits(tuned)
    failing = threading.local()
    layers = [module.base_layer for name, module in tuned.named_modules() if name.endswith("_proj")]

    def maybe_fail(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if getattr(failing, "layer", None) is module:
            raise InterruptedError

    handles = [layer.register_forward_hook(maybe_fail) for layer in layers]
    wrong: list[int] = []

    def fails() -> None:
        for turn in range(100):
            failing.layer = layers[turn % len(layers)]
            with pytest.raises(InterruptedError):
                tuned(input_ids=X)

    def forwards() -> None:
        for _ in range(100):
            with torch.no_grad():
                wrong.extend([1] * (not tuned(input_ids=X).logits.equal(expected)))

    run_threads([fails, fails, forwards, forwards])
    for handle in handles:
        handle.remove()
    assert wrong == [] and logits(tuned).equal(expected)
    assert_base_is_whole(tuned.unload(), base)


def test_an_interrupted_merge_leaves_the_base(base, tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(tuned)
    layer = tuned.base_model.model.model.layers[1].mlp.up_proj
    real = layer.base.write_rows

    def interrupted(rows: slice, values: torch.Tensor) -> None:
        monkeypatch.setattr(layer.base, "write_rows", real)
        real(rows, torch.cat([values[:10], layer.base.stored.detach()[10:]]))  # half of it
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.base, "write_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned.merge_adapter()
    assert not layer.merged_adapters
    tuned.unmerge_adapter()
    assert logits(tuned).equal(expected)
    assert_base_is_whole(tuned.unload(), base)


def test_a_merge_between_forward_and_backward_is_refused(tuned) -> None:
    loss = tuned(input_ids=X, labels=X).loss
    tuned.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_few_tokens_agree_with_the_merged_model(tuned) -> None:
    before = logits(tuned, FEW)
    tuned.merge_adapter()
    torch.testing.assert_close(before, logits(tuned, FEW), rtol=1e-5, atol=1e-5)


def gradients(model: nn.Module, prepare: Callable[[nn.Module], nn.Module | None]) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    changed = prepare(model)
    run = model if changed is None else changed
    run(input_ids=X, labels=X).loss.backward()
    return {name: param.grad for name, param in trained.items()}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(tuned, reentrant: bool) -> None:
    def checkpointed(model) -> None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    assert_same_gradients(gradients(tuned, checkpointed), gradients(tuned, lambda model: None))


@pytest.mark.long
def test_torch_compile_is_one_graph_with_equal_gradients(tuned) -> None:
    expected = gradients(tuned, lambda model: None)
    assert_same_gradients(gradients(tuned, lambda model: torch.compile(model, fullgraph=True)), expected)
    for ids in (FEW, MANY):
        compiled = torch.compile(copy.deepcopy(tuned), fullgraph=True)
        torch.testing.assert_close(logits(compiled, ids), logits(tuned, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
def test_hooks_on_the_base_layer_fire(tuned, ids: torch.Tensor) -> None:
    layer = tuned.base_model.model.model.layers[0].mlp.up_proj
    expected = logits(tuned, ids)
    seen: list[str] = []
    handles = [
        layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append("pre")),
        layer.base_layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append("kw"), with_kwargs=True),
        layer.base_layer.register_forward_hook(lambda module, args, y: seen.append("post")),
        layer.base_layer.register_full_backward_hook(lambda module, dx, dy: seen.append("back")),
    ]
    assert logits(tuned, ids).equal(expected) and seen == ["pre", "kw", "post"]
    tuned(input_ids=ids).logits.sum().backward()
    assert seen == ["pre", "kw", "post"] * 2 + ["back"]
    layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    for handle in handles:
        handle.remove()
    doubled = logits(tuned, ids)
    tuned.merge_adapter()
    torch.testing.assert_close(logits(tuned, ids), doubled, rtol=1e-5, atol=1e-5)
    assert not doubled.equal(expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(base, tuned, tmp_path, when: str, where: str) -> None:
    """accelerate keeps weights away and brings them for each forward: the base's before tuning, or all after it."""

    def offload(model: nn.Module) -> None:
        if where == "cpu":
            cpu_offload(model, execution_device="cpu")
        else:
            disk_offload(model, tmp_path / "offloaded", execution_device="cpu")

    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    if when == "after":
        offload(tuned)
        assert tuned.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.is_meta
        assert logits(tuned).equal(expected)
        return
    other = copy.deepcopy(base)
    offload(other)
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert logits(loaded).equal(expected)
    fresh = get_peft_model(loaded.unload(), NeuroAdaConfig(k=5, target_modules=TARGETS))
    assert logits(fresh).equal(logits(base))
    layers = zip(fresh.base_model.adapted_layers("default"), tuned.base_model.adapted_layers("default"), strict=True)
    assert all(a.neuroada_idx["default"].equal(b.neuroada_idx["default"]) for a, b in layers)


@pytest.mark.parametrize("scaler", [False, True])
def test_training_under_autocast(base, scaler: bool) -> None:
    """bf16 products over fp32 weights: close to fp32's curve, and the deltas' gradients arrive in fp32."""

    def curve(autocast: bool) -> list[float]:
        model = get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=5, target_modules=TARGETS)).train()
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
        scale = torch.amp.GradScaler("cpu", enabled=scaler and autocast)
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=X, labels=X).loss
            scale.scale(loss).backward()
            assert all(param.grad.dtype == torch.float32 for param in trained)
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert curve(True) == pytest.approx(curve(False), rel=5e-3)


class Doubling(nn.Linear):
    """A Linear with a forward of its own, as BitNet's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_is_refused() -> None:
    model = nn.ModuleDict({"lin": Doubling(8, 8)})
    with pytest.raises(UserError, match="lin is a Doubling, whose own forward may do more"):
        get_peft_model(model, NeuroAdaConfig(k=2, target_modules=["lin"]))
