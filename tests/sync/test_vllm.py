"""vLLM's interface, without a GPU: signatures and the patch loader of an installed vLLM, and a stand-in's engine.

Not run: vLLM itself. The model here packs q, k and v into one weight, gate and up into another, and splits them over
two tensor-parallel workers, as vLLM's Llama does.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_source
from sync_models import change, checkpoint_of, merged, plain, senders, tuned

from neuroada.sync import FolderTransport, Sender, SyncError, WrongBase
from neuroada.sync.vllm import BACKEND, WorkerExtension, publish_to_vllm, register

PACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}


class PackedModel(torch.nn.Module):
    """A worker's share of a Llama, loaded from checkpoint tensors by final copies as vLLM's loaders make."""

    def __init__(self, checkpoint: dict[str, torch.Tensor], rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.places: dict[str, torch.Tensor] = {}
        packed: dict[str, list[str]] = {}
        for name in checkpoint:
            kind = name.split(".")[-2]
            packed.setdefault(name.replace(kind, PACKED.get(kind, kind)), []).append(name)
        for runtime, names in packed.items():
            sizes = [self.local(name, checkpoint[name]).shape for name in names]
            data = torch.zeros(sum(size[0] for size in sizes), *sizes[0][1:], dtype=checkpoint[names[0]].dtype)
            self.register_parameter(runtime.replace(".", "_"), torch.nn.Parameter(data, requires_grad=False))
            start = 0
            for name, its in zip(names, sizes, strict=True):
                self.places[name] = data.narrow(0, start, its[0])
                start += its[0]
        self.load_weights(list(checkpoint.items()))

    def local(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.split(".")[-2] in ("o_proj", "down_proj"):
            return tensor.chunk(self.size, 1)[self.rank]
        return tensor.chunk(self.size, 0)[self.rank] if name.endswith("_proj.weight") else tensor

    def load_weights(self, weights) -> set[str]:
        for name, tensor in weights:
            self.places[name].copy_(self.local(name, tensor))
        return {name for name, _ in weights}


def assert_holds(worker: PackedModel, checkpoint: dict[str, torch.Tensor]) -> None:
    for name, place in worker.places.items():
        assert place.equal(worker.local(name, checkpoint[name])), name


@pytest.fixture(params=["vLLM's patch loader", "stand-in"])
def patches(request: pytest.FixtureRequest):
    if request.param == "stand-in":
        return vllm_source.stand_in_patches()
    folder = vllm_source.installed()
    if folder is None:
        pytest.skip("vLLM is not installed: its own patch loader is not run")
    return vllm_source.load_real_patches(folder)


def test_signatures_are_those_of_the_installed_vllm() -> None:
    folder = vllm_source.installed()
    if folder is None:
        pytest.skip("vLLM is not installed: the signatures read from 0.33.0 are not compared")
    for path, expected in vllm_source.SIGNATURES.items():
        found = vllm_source.signatures(folder / path)
        assert {name: found[name] for name in expected} == expected
    base = folder / "distributed/weight_transfer/base.py"
    assert vllm_source.abstract_methods(base, "WeightTransferEngine") == vllm_source.ABSTRACT


class Workers:
    """vLLM's client and workers in one: what `collective_rpc` would bring to each of them."""

    def __init__(self, base_folder: Path, folder: Path, checkpoint: dict[str, torch.Tensor], size: int = 2) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        config = SimpleNamespace(parallel_config=None, model_config=SimpleNamespace(model=str(base_folder)))
        self.models = [PackedModel(checkpoint, rank, size) for rank in range(size)]
        self.engines = [
            WeightTransferEngineFactory.create_engine(SimpleNamespace(backend=BACKEND), config, "cpu", model)
            for model in self.models
        ]
        for engine in self.engines:
            engine.init_transfer_engine(engine.parse_init_info({"folder": str(folder)}))
        self.version: str | None = None

    def start_weight_update(self) -> None:
        for engine in self.engines:
            engine.start_weight_update()

    def update_weights(self, update_info) -> None:
        for engine in self.engines:
            engine.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        for engine in self.engines:
            engine.finish_weight_update()
        self.version = weight_version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_workers_hold_the_trainer_s_weights(base_folder, tmp_path, monkeypatch, patches, dtype) -> None:
    vllm_source.install(monkeypatch, patches)
    register()
    register()  # vLLM loads plugins once a process, but says they must stand it twice
    trainer, base = tuned(base_folder, dtype), checkpoint_of(plain(base_folder, dtype))
    workers, sender, transport = (
        Workers(base_folder, tmp_path, base),
        Sender(trainer),
        FolderTransport(tmp_path, keep=2),
    )
    for version in range(3):
        change(trainer, version)
        assert publish_to_vllm(sender, transport, workers) == version
        assert workers.version == str(version)
        for model in workers.models:
            assert_holds(model, merged(trainer))

    workers = Workers(base_folder, tmp_path, base)  # started again, in the middle
    assert publish_to_vllm(sender, transport, workers) == 4  # 3 was refused, 4 is the state
    for model in workers.models:
        assert_holds(model, merged(trainer))
    for engine, model in zip(workers.engines, workers.models, strict=True):
        engine._follows[0].restore()
        assert_holds(model, base)
        engine.shutdown()
        with pytest.raises(RuntimeError, match="folder of the messages"):
            engine.update_weights({"version": 5})


def test_what_vllm_cannot_take_is_an_error(base_folder, tmp_path, monkeypatch) -> None:
    """Another base in its files; a version that is not there."""
    vllm_source.install(monkeypatch, vllm_source.stand_in_patches())
    register()
    trainer = tuned(base_folder)
    base = checkpoint_of(plain(base_folder))
    workers, transport = Workers(base_folder, tmp_path, base), FolderTransport(tmp_path)
    trainer.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.weight.data += 1e-3
    with pytest.raises(WrongBase, match="another base"):
        publish_to_vllm(Sender(trainer), transport, workers)
    with pytest.raises(SyncError, match="version 7 was announced"):
        Workers(base_folder, tmp_path / "empty", base).update_weights({"version": 7})


def test_the_worker_extension_of_older_versions(base_folder: Path, tmp_path: Path) -> None:
    """Whole tensors through load_weights, from two ranks' messages."""
    trainer, base = tuned(base_folder, torch.bfloat16), checkpoint_of(plain(base_folder, torch.bfloat16))
    worker, out, ranks = WorkerExtension(), FolderTransport(tmp_path), senders(trainer, 2)
    model_config = SimpleNamespace(model=str(base_folder))
    worker.model_runner = SimpleNamespace(model=PackedModel(base, 0, 2), model_config=model_config)
    for version in range(2):
        change(trainer, version)
        for sender in ranks:
            out.send(sender.message())
        worker.neuroada_follow(str(tmp_path), version)
        assert_holds(worker.model_runner.model, merged(trainer))
