"""The worker's side of vLLM's backend "neuroada". vLLM imports this module; `neuroada.sync.vllm.register` names it."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from neuroada.sync.receiver import Receiver
from neuroada.sync.transports import FolderTransport
from neuroada.sync.vllm import CheckpointWeights, local_folder, reach


@dataclass
class NeuroAdaInitInfo(WeightTransferInitInfo):
    """folder: where the trainer's messages arrive, as this worker sees it."""

    folder: str


@dataclass
class NeuroAdaUpdateInfo(WeightTransferUpdateInfo):
    """version: that the trainer has written."""

    version: int


class NeuroAdaWeightTransferEngine(WeightTransferEngine):
    """Follows a folder. vLLM runs an update between two steps of its scheduler, so that no step sees half of one."""

    init_info_cls = NeuroAdaInitInfo
    update_info_cls = NeuroAdaUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        self._follows: tuple[Receiver, FolderTransport] | None = None

    def init_transfer_engine(self, init_info: NeuroAdaInitInfo) -> None:
        from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

        weights = CheckpointWeights(self.model, local_folder(self.model_config.model), load_checkpoint_weight_patches)
        self._follows = (Receiver(weights), FolderTransport(init_info.folder))

    def start_weight_update(self) -> None:
        """Nothing: patches are applied in place, without vLLM's layerwise reload."""

    def finish_weight_update(self) -> None:
        """Nothing: `receive_weights` has applied the version."""

    def receive_weights(self, update_info: NeuroAdaUpdateInfo) -> None:
        if self._follows is None:
            raise RuntimeError("call init_weight_transfer_engine with the folder of the messages first")
        reach(*self._follows, update_info.version)

    def shutdown(self) -> None:
        self._follows = None
