"""What the two tuners share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.naming.inits import changes_base_weights
from lorakit.tuners._combination import Combination
from lorakit.tuners.module_tree import Tree, module_tree, restore

_FSDP1 = "._fsdp_wrapped_module"


def not_positive_integers(values: Mapping[str, Any]) -> list[str]:
    """What to say of those of a config's values, by name, that are no positive integers."""
    return [
        f"`{name}` must be a positive integer; got {value!r}."
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]


class NamesItsInit:
    """For a config of a type of its own: what PEFT sets as `init_weights` there is what LoRA calls `init_lora_weights`.

    It does so when an adapter whose initialization changed the base weight is saved as one of the original weight.
    """

    init_lora_weights: Any

    @property
    def init_weights(self) -> Any:
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: Any) -> None:
        self.init_lora_weights = value


class ResolvingLoraModel(LoraModel):
    """PEFT's LoRA model, which completes an adapter's config for the model at hand in a copy of it.

    A config that needs no completing is kept itself, as PEFT keeps it: code that passed it may expect to find it. So is
    one with which an adapter is loaded for inference; the completed copy then only makes the layers.
    """

    completes_configs = True
    tuner_name: str
    combination: Combination | None = None  # while add_weighted_adapter makes one
    weights_before: dict[nn.Module, tuple[nn.Parameter, Tensor]] | None = None  # while an initialization changes them

    def resolve(self, config: Any, model: nn.Module, state_dict: dict[str, Tensor] | None) -> None:
        """Complete `config`, a copy, for `model`; raise where they do not fit. Nothing has been changed yet.

        A `state_dict` says which modules are adapted, where there is one.
        """
        raise NotImplementedError

    def complete(self, model: nn.Module, adapter_name: str) -> None:
        """What is left to do for an adapter whose layers have been made; where it raises, they are taken out again."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """As PEFT's, which finds entries by the live modules' names and so finds none of a model wrapped by FSDP1:
        that adds to the names of modules, but takes it out of its state dicts again."""
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
            # not on the device, whose memory may be just enough for the model
            values = base.weight.detach().to("cpu", copy=True)
            self.weights_before.setdefault(base, (base.weight, values))
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

    def _prepared(self, config: Any, model: nn.Module) -> nn.Module:
        """The model whose modules PEFT will adapt: `model`, or with `layer_replication` what that makes of a copy of it
        that has its tensors."""
        if not config.layer_replication:
            return model
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        copied = copy.deepcopy(model, tensors)
        self._prepare_model(config, copied)
        return copied

    def combine_more(
        self, adapters: list[str], weights: list[float], adapter_name: str, kind: str, **settings: Any
    ) -> None:
        """Combine what adapters have beside the factors; where it raises, the new adapter is taken out again."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        """As `peft.LoraModel.add_weighted_adapter`, with a rank for each module, which the new config records.

        A module's rank is the sum of its ranks in `adapters` for "cat"; `svd_rank`, or the largest rank anywhere in
        `adapters`, for the types that end in "svd" (of a Conv2d at most what its matrix has); for the other types, the
        one rank that all of them have there.
        Raises: ValueError where the result would not be the combination that was asked for, or where PEFT refuses;
        the model is then as it was before.
        """
        if adapter_name in self.peft_config:
            return
        if len(adapters) != len(weights):
            raise ValueError(
                f"{self.tuner_name}: `weights` must have one entry for each of the {len(adapters)} adapters; got "
                f"{len(weights)}."
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
        # PEFT's own fails where a matrix has fewer singular values than ranks were asked for
        fitting = min(rank, target_lora_A.numel() // rank, target_lora_B.numel() // rank)
        A, B = super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination_type, adapters, weights, fitting, target, target_lora_A, target_lora_B, *args, **kwargs
        )
        missing = rank - fitting
        return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing > 0 else (A, B)


def _share_modules_to_save(kept: Any, original: Any) -> None:
    """Have the list of modules to save in common between a completed copy and the config that was passed.

    PEFT's models for classification and question answering add their heads to it, in what was passed, only now.
    """
    if kept is original:
        return
    if original.modules_to_save is None and original.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        original.modules_to_save = []
    kept.modules_to_save = original.modules_to_save


def _forget(before: Tree, adapter_name: str) -> None:
    """Take what there is of a half-injected adapter out of the layers that were there before."""
    for layer, _ in before:
        if isinstance(layer, BaseTunerLayer):
            for container in (
                getattr(layer, name, None) for name in layer.adapter_layer_names + layer.other_param_names
            ):
                if isinstance(container, dict | nn.ModuleDict | nn.ParameterDict) and adapter_name in container:
                    del container[adapter_name]


def changes_base(config: Any) -> bool:
    """Whether the initialization that a config asks for changes the base weights."""
    init = getattr(config, "init_lora_weights", None)
    by_init = changes_base_weights(init)
    return by_init or getattr(config, "kasa_config", None) is not None
