"""An adapter's parameters, by its name, in a layer."""

from torch import nn


class AdapterParameters(nn.ParameterDict):
    """adapter -> Parameter, as a ParameterDict is used; in the module tree each is `<adapter>.weight`.

    TRL copies an adapter by the parameters whose names contain `.default.`, so the adapter's name may not be the last.
    In files the names end with this dictionary's own (`NeuroAdaModel._remove_adapter_name_from_key`).
    """

    def __getitem__(self, adapter: str) -> nn.Parameter:
        return self._modules[adapter]._parameters["weight"]  # type: ignore[union-attr, return-value]

    def __setitem__(self, adapter: str, param: nn.Parameter) -> None:
        holder = self._modules.get(adapter)
        if holder is None:
            holder = nn.Module()
            self.add_module(adapter, holder)
            self._keys[adapter] = None
        holder.weight = param if isinstance(param, nn.Parameter) else nn.Parameter(param, param.is_floating_point())

    def __delitem__(self, adapter: str) -> None:
        del self._keys[adapter]
        del self._modules[adapter]

    def holder(self, adapter: str) -> nn.Module:
        """The module that accelerate hooks when it offloads the parameter."""
        return self._modules[adapter]  # type: ignore[return-value]
