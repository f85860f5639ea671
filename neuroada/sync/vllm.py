"""vLLM follows a trainer, through vLLM's own weight-update interface. Not run on a GPU: tested against its source.

With a version that has `CheckpointWeightPatch` (0.33 was read), every worker of an engine started with

    vllm serve MODEL --weight-transfer-config '{"backend": "neuroada"}'

reads the messages from a folder, and patches flat indices and absolute values through the model's own loader, which
knows vLLM's packed and sharded layouts. The trainer calls `publish_to_vllm`. An older version takes `WorkerExtension`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from neuroada.errors import UserError
from neuroada.files.tensors import open_tensors, weight_files
from neuroada.ops import unpack_indices
from neuroada.sync.message import Message, SyncError, WrongBase
from neuroada.sync.receiver import Receiver
from neuroada.sync.sender import Sender
from neuroada.sync.transports import FolderTransport, follow, publish
from neuroada.sync.weights import check_columns, check_rows

BACKEND = "neuroada"


def register() -> None:
    """vLLM's plugin entry point (group vllm.general_plugins): makes the backend's name known in every process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # plugins may be loaded more than once in a process
        WeightTransferEngineFactory.register_engine(
            BACKEND, "neuroada.sync.vllm_engine", "NeuroAdaWeightTransferEngine"
        )


class Client(Protocol):
    """vLLM's `VLLMWeightSyncClient`: HTTPVLLMWeightSyncClient, RayVLLMWeightSyncClient, or one of your own."""

    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def publish_to_vllm(
    sender: Sender, transport: FolderTransport, client: Client, barrier: Callable[[], Any] = lambda: None
) -> int:
    """Send the next version and have vLLM take it. Every trainer rank calls it; rank 0 speaks to vLLM. -> the version.

    `barrier` waits until every rank has written. An engine that was started again asks for the state, and gets it by
    the second try. What the client raises at the second is raised.
    """
    for attempt in range(2):
        version = publish(sender, transport)
        barrier()
        failure = _drive(client, version) if sender.part == 0 else None
        if not sender.agree(failure is not None):
            return version
        if failure is not None and attempt:
            raise failure
    raise SyncError(f"vLLM did not take version {version}: rank 0 says why")


def _drive(client: Client, version: int) -> Exception | None:
    try:
        client.start_weight_update()
        client.update_weights({"version": version})
        client.finish_weight_update(weight_version=str(version))
    except Exception as error:  # whatever the client's transport raises: the caller tries once more, then raises it
        return error
    return None


def reach(receiver: Receiver, transport: FolderTransport, version: int) -> None:
    """Follow the folder to `version`, or say why not: to serve other weights than were announced is an error."""
    try:
        reached = follow(receiver, transport)
    except UserError as error:
        if isinstance(error, SyncError):  # the trainer was started again
            receiver.restore()
        transport.ask()
        raise
    if reached != version:
        transport.ask()
        raise SyncError(f"version {version} was announced, {reached} is there: the state is asked for; publish again")


class CheckpointWeights:
    """The weights of a model that loads Hugging Face checkpoints by `load_weights`, changed in checkpoint coordinates.

    The base is checked against the checkpoint's files, since vLLM packs and splits what it has read.

    Args:
        model: vLLM's model on this worker; a shard of it takes what is its own.
        checkpoint: the folder it was loaded from.
        load_patches: vLLM's `load_checkpoint_weight_patches`; None loads whole tensors, read from the checkpoint again.
    """

    def __init__(self, model: nn.Module, checkpoint: Path, load_patches: Callable[..., Any] | None) -> None:
        self.model, self.load_patches = model, load_patches
        self.files = Checkpoint(checkpoint)
        self.device = next((param.device for param in model.parameters()), torch.device("cpu"))
        self._shapes: dict[str, tuple[int, int]] = {}
        self._flat: dict[str, torch.Tensor] = {}
        self._base: dict[str, torch.Tensor] = {}

    def load(self, parts: list[Message]) -> None:
        check_rows(parts)
        shapes, flat, base = {}, {}, {}
        for name, module in _modules(parts).items():
            idx = torch.cat([unpack_indices(part.idx[name]) for part in parts if name in part.idx])
            check_columns(name, idx, module.shape[1])
            base[name] = _join([part.base for part in parts], name)
            if not self.files.entries(name, module.shape, idx, base[name].dtype).equal(base[name]):
                raise WrongBase(f"{name}.weight: {self.files.folder} holds another base than the trainer's")
            rows = torch.arange(module.shape[0])[:, None]
            shapes[name], flat[name] = module.shape, (rows * module.shape[1] + idx).flatten()
        self._put(self._base)  # of the adapter before
        self._shapes, self._base = shapes, base
        self._flat = {name: positions.to(self.device, torch.int32) for name, positions in flat.items()}
        self.write(parts)

    def write(self, parts: list[Message]) -> None:
        values = {name: _join([part.values for part in parts], name) for name in self._shapes}
        for name, base in self._base.items():
            if values[name].shape != base.shape or values[name].dtype != base.dtype:
                raise SyncError(f"{name}: the message's values do not fit the state that is there: ask for the state")
        self._put(values)

    def restore(self) -> None:
        self._put(self._base)
        self._shapes, self._flat, self._base = {}, {}, {}

    def _put(self, values: dict[str, torch.Tensor]) -> None:
        """Bring values [out, k] to every weight."""
        if not values:
            return
        if self.load_patches is None:
            for name, new in values.items():
                whole = self.files.read(name, self._shapes[name]).to(new.dtype)
                whole.view(-1)[self._flat[name].cpu().long()] = new.flatten()
                self.model.load_weights([(f"{name}.weight", whole.to(self.device))])  # type: ignore[operator]
            return
        from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

        patches = [
            CheckpointWeightPatch(
                name=f"{name}.weight",
                shape=self._shapes[name],
                dtype=new.dtype,
                values=new.flatten().to(self.device),
                indices=self._flat[name],
            )
            for name, new in values.items()
        ]
        self.load_patches(self.model, patches, validate_unique_indices=False)  # `load` has checked them


def _modules(parts: list[Message]) -> dict[str, Any]:
    return {name: module for part in parts for name, module in (part.header.modules or {}).items()}


def _join(tensors: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    """The parts' rows of one module, in the order of rows, which is that of ranks."""
    found = [part[name] for part in tensors if name in part]
    if not found:
        raise SyncError(f"{name}: the message's values do not fit the state that is there: ask for the state")
    return torch.cat(found)


class Checkpoint:
    """The base weights in a Hugging Face folder of safetensors files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = weight_files(folder, "vLLM's model = ")

    def read(self, module: str, shape: tuple[int, int]) -> torch.Tensor:
        """A module's weight [out, in], in the file's dtype. WrongBase where there is none of that shape."""
        found = self._tensors.get(f"{module}.weight")
        if found is None or found.shape != shape:
            raise WrongBase(f"{module}.weight: {self.folder} has none of shape {shape}: serve the trainer's base model")
        with open_tensors(found.file) as file:
            return file.get_tensor(found.name)

    def entries(self, module: str, shape: tuple[int, int], idx: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Its values at idx [out, k], in `dtype`."""
        return self.read(module, shape).gather(1, idx).to(dtype)


class WorkerExtension:
    """For vLLM without `CheckpointWeightPatch`: --worker-extension-cls neuroada.sync.vllm.WorkerExtension

    and `llm.collective_rpc("neuroada_follow", args=(folder, version))` after `publish`. Each change loads whole tensors
    through `load_weights`: exact, and as slow as a whole copy within the worker; what travels stays small.
    """

    def neuroada_follow(self, folder: str, version: int) -> None:
        if not hasattr(self, "_neuroada"):
            runner = self.model_runner  # type: ignore[attr-defined]
            weights = CheckpointWeights(runner.model, local_folder(runner.model_config.model), None)
            self._neuroada = (Receiver(weights), FolderTransport(folder))
        reach(*self._neuroada, version)


def local_folder(model: str) -> Path:
    """Where vLLM read a model from: a folder, or the hub's cache on this machine."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))
