"""The config mixin and the model class that both tuners share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._checks import check_integer
from lorakit.naming.inits import changes_base_weights
from lorakit.tuners._combination import Combination
from lorakit.tuners.module_tree import Tree, module_tree, restore

_FSDP1 = "._fsdp_wrapped_module"


def integer_errors(values: Mapping[str, Any]) -> list[str]:
    """Error messages for config values that are not positive integers."""
    errors = []
    for name, value in values.items():
        try:
            check_integer(name, value)
        except ValueError as error:
            errors.append(str(error))
    return errors


class InitWeightsAlias:
    """Alias `init_weights` to `init_lora_weights`; PEFT sets the former on configs of other types than LORA.

    PEFT does that when it converts an adapter whose initialization changed the base weights.
    """

    init_lora_weights: Any

    @property
    def init_weights(self) -> Any:
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: Any) -> None:
        self.init_lora_weights = value


class ResolvingLoraModel(LoraModel):
    """PEFT's LoRA model, with configs that are completed for the model at hand.

    The completed config is a copy; the config that was passed never changes. The passed object itself is kept in
    `peft_config` where there was nothing to complete, and where an adapter is loaded for inference: the completed copy
    then only serves to make the layers.
    """

    completes_configs = True
    tuner_name: str
    combination: Combination | None = None  # set during add_weighted_adapter
    weights_before: dict[nn.Module, tuple[nn.Parameter, Tensor]] | None = None  # set while base weights may change

    def resolve(self, config: Any, model: nn.Module, state_dict: dict[str, Tensor] | None) -> None:
        """Complete `config`, a copy, for `model`, and raise if they do not fit. The model has not been changed yet.

        If there is a `state_dict`, it decides which modules are adapted.
        """
        raise NotImplementedError

    def complete(self, model: nn.Module, adapter_name: str) -> None:
        """Finish an adapter whose layers have been made. If this raises, the layers are removed again."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """PEFT's method, made to work under FSDP1.

        PEFT looks entries up by module names. FSDP1 adds a prefix to module names, but not to its state dict's keys.
        """
        live = {name.replace(_FSDP1, ""): name for name, _ in model.named_modules()}
        entries = {}
        for key, value in state_dict.items():
            module, _, leaf = key.rpartition(".")
            entries[f"{live.get(module, module)}.{leaf}"] = value
        found = super()._get_adapter_state_dict(model, config, adapter_name, entries, *args, **kwargs)
        return {key.replace(_FSDP1, ""): value for key, value in found.items()}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        original = self.peft_config[adapter_name]
        if self.combination is not None:
            self.combination.complete(original, model)
        before = module_tree(model)
        config = copy.deepcopy(original)
        self.resolve(config, self._prepared(config, model), state_dict)
        if not self.completes_configs or vars(config) == vars(original):
            config = original
        kept = original if original.inference_mode else config
        self.peft_config[adapter_name] = config
        self.weights_before = {} if changes_base(config) else None
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            self.complete(model, adapter_name)
            self.peft_config[adapter_name] = kept
            _share_modules_to_save(kept, original)
        except BaseException:
            self.peft_config[adapter_name] = original
            _forget(before, adapter_name)
            restore(before)
            for module, (parameter, values) in (self.weights_before or {}).items():
                parameter.data = values.to(parameter.device)
                module.weight = parameter
            raise
        finally:
            self.weights_before = None

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if self.weights_before is not None and isinstance(getattr(base, "weight", None), nn.Parameter):
            # on the CPU, because the device's memory may be just enough for the model
            values = base.weight.detach().to("cpu", copy=True)
            self.weights_before.setdefault(base, (base.weight, values))
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

    def _prepared(self, config: Any, model: nn.Module) -> nn.Module:
        """The model that PEFT adapts: `model`, or with `layer_replication` a replicated copy that shares tensors."""
        if not config.layer_replication:
            return model
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        copied = copy.deepcopy(model, tensors)
        self._prepare_model(config, copied)  # replicates the layers
        return copied

    def combine_more(
        self, adapters: list[str], weights: list[float], adapter_name: str, kind: str, **settings: Any
    ) -> None:
        """Combine what adapters have besides the factors. If this raises, the new adapter is removed again."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        """`peft.LoraModel.add_weighted_adapter` with a rank for each module, which the new config records.

        A module's rank is

        * for "cat", the sum of its ranks in `adapters`;
        * for types that end in "svd", `svd_rank`, or by default the largest rank anywhere in `adapters` (in a Conv2d at
          most the rank of its matrix);
        * for the other types, the rank that all `adapters` share there.

        Raises: ValueError if the result would not be the combination asked for, or if PEFT refuses. The model is then
        unchanged.
        """
        if adapter_name in self.peft_config:
            return
        if len(adapters) != len(weights):
            raise ValueError(
                f"{self.tuner_name}: `weights` must have one entry for each of the {len(adapters)} adapters; got "
                f"{len(weights)} entries."
            )
        kind = "linear" if len(adapters) == 1 else combination_type
        self.combination = Combination(self.tuner_name, adapters, kind)
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, svd_rank, **kwargs)
            self.combine_more(adapters, weights, adapter_name, kind, **kwargs)
        except BaseException:
            if adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise
        finally:
            self.combination = None

    def _check_add_weighted_adapter(
        self, adapters: list[str], combination_type: str, svd_rank: int | None
    ) -> tuple[str, int, Any]:
        if self.combination is not None:
            self.combination.check(self.model, self.peft_config)
        checked: tuple[str, int, Any] = super()._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        return checked

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        new_rank: int,
        target: LoraLayer,
        target_lora_A: Tensor,
        target_lora_B: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        rank = target_lora_A.shape[0]
        # PEFT fails if the rank exceeds the number of a matrix's singular values, so the rest is padded with zeros
        fitting = min(rank, target_lora_A.numel() // rank, target_lora_B.numel() // rank)
        A, B = super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination_type, adapters, weights, fitting, target, target_lora_A, target_lora_B, *args, **kwargs
        )
        missing = rank - fitting
        return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing > 0 else (A, B)


def _share_modules_to_save(kept: Any, original: Any) -> None:
    """Make a completed copy share its `modules_to_save` with the config that was passed.

    PEFT's models for classification and question answering add their heads to the passed config after this.
    """
    if kept is original:
        return
    if original.modules_to_save is None and original.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        original.modules_to_save = []
    kept.modules_to_save = original.modules_to_save


def _forget(before: Tree, adapter_name: str) -> None:
    """Remove a half-injected adapter from the layers that existed before."""
    for layer, _ in before:
        if isinstance(layer, BaseTunerLayer):
            for container in (
                getattr(layer, name, None) for name in layer.adapter_layer_names + layer.other_param_names
            ):
                if isinstance(container, dict | nn.ModuleDict | nn.ParameterDict) and adapter_name in container:
                    del container[adapter_name]


def changes_base(config: Any) -> bool:
    """Whether an adapter with this config changes the base weights when it is initialized."""
    by_init = changes_base_weights(getattr(config, "init_lora_weights", None))
    return by_init or getattr(config, "kasa_config", None) is not None
