"""How each server reads a PEFT adapter: the one table of rules that `check` and the writers go by.

Every row says how it is known: "ran", the server's own code was run on lorakit's exports; "read", its source was read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Content = Literal["DoRA", "lora_bias", "modules_to_save", "SPECLORA", "stacked experts"]
Scaling = Literal["patterns", "config", "own rank", "padded rank", "one"]

# The values that vLLM takes for --max-lora-rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_FULL: tuple[Content, ...] = ("DoRA", "lora_bias", "modules_to_save", "SPECLORA", "stacked experts")


@dataclass(frozen=True)
class ServerProfile:
    """What one server makes of a PEFT directory.

    Args:
        name: what `check` and `for_server` call it.
        version: the version that the row is about.
        evidence: "ran" or "read".
        source: the function or file that says so.
        scaling: the factor of B A that it applies. "patterns": PEFT's, by module. "config": `lora_alpha / r` of the
            config for every module. "own rank": `lora_alpha` over the tensor's own rank. "padded rank": `lora_alpha`
            over the largest rank, times rank over the kernel's rank. "one": 1, whatever the config says.
        reads_rslora: whether `use_rslora` changes what it applies.
        mixed_ranks: whether it loads modules of different ranks.
        kernel_multiple: ranks above 8 that are no multiple of this are scaled down by its kernels; 1: none are.
        integer_alpha: whether it cannot read a fractional `lora_alpha`.
        max_rank: the largest rank that it can be told to serve; None: no limit is known.
        default_max_rank: the largest rank without `flag`.
        flag: the option that raises the largest rank.
        refuses: contents that it refuses or leaves out.
        config_fields: the config fields that it knows, where an unknown one is an error.
        anchored_patterns: whether keys of patterns may begin with ``^``.
        own_format: the file that it reads instead of a PEFT directory, and the command that writes one.
        note: what else a user must know.
        experts_note: what a user must know where experts are stacked in parameters (`target_parameters`).
        superseded: whether the table also has a newer version of the same server.
    """

    name: str
    version: str
    evidence: Literal["ran", "read"]
    source: str
    scaling: Scaling
    reads_rslora: bool = False
    mixed_ranks: bool = True
    kernel_multiple: int = 1
    integer_alpha: bool = False
    max_rank: int | None = None
    default_max_rank: int | None = None
    flag: str | None = None
    refuses: tuple[Content, ...] = _FULL
    config_fields: frozenset[str] | None = None
    anchored_patterns: bool = True
    own_format: str | None = None
    note: str | None = None
    experts_note: str | None = None
    superseded: bool = False

    @property
    def one_rank(self) -> bool:
        """Whether it is right only for adapters with one rank."""
        return self.scaling != "patterns"

    def takes(self, rank: int) -> bool:
        """Whether its kernels apply an update of this rank at full scale."""
        return self.kernel_rank(rank) == rank

    def kernel_rank(self, rank: int) -> int:
        """The rank that its kernels compute with: 8, or the next multiple."""
        if self.kernel_multiple == 1:
            return rank
        return 8 if rank <= 8 else -(-rank // self.kernel_multiple) * self.kernel_multiple


_PEFT_0_13 = frozenset(
    (
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
        *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora"),
        *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
        *("alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "use_dora", "layer_replication"),
        "runtime_config",
    )
)
_LORAX = "LoraWeights.load: alpha over the config's r, which the padded rank overwrites after each layer type"
_VLLM_EXPERTS = (
    "Stacked experts are read (LoRAModelManager._stack_moe_lora_weights) for models whose class in vLLM has "
    "`is_3d_moe_weight`, such as gpt-oss, and only with gate_up_proj and down_proj both adapted; for others the rows "
    "of gate and up are taken as alternating. Compare logits before you serve."
)
_SGLANG_EXPERTS = "Stacked experts are left out without a word, unless it runs with --lora-strict-loading."

PROFILES: dict[str, ServerProfile] = {
    profile.name: profile
    for profile in (
        ServerProfile(
            "peft",
            "0.15 or newer",
            "ran",
            "peft.tuners.lora: rank_pattern and alpha_pattern, by module",
            "patterns",
            reads_rslora=True,
            refuses=(),
        ),
        ServerProfile(
            "peft-0.14",
            "0.14",
            "ran",
            "get_pattern_key: keys that begin with ^ match nothing",
            "patterns",
            reads_rslora=True,
            anchored_patterns=False,
            refuses=("SPECLORA", "stacked experts"),
            superseded=True,
        ),
        ServerProfile(
            "peft-0.13",
            "0.13",
            "ran",
            "LoraConfig(**fields): TypeError for a field that it does not have",
            "patterns",
            reads_rslora=True,
            anchored_patterns=False,
            config_fields=_PEFT_0_13,
            refuses=("lora_bias", "SPECLORA", "stacked experts"),
            superseded=True,
        ),
        ServerProfile(
            "vllm",
            "0.33",
            "ran",
            "PEFTHelper, LoRAModel.from_local_checkpoint",
            "patterns",
            reads_rslora=True,
            max_rank=VLLM_RANKS[-1],
            default_max_rank=16,
            flag="--max-lora-rank",
            experts_note=_VLLM_EXPERTS,
        ),
        ServerProfile(
            "vllm-0.28",
            "0.28 or older",
            "read",
            "PEFTHelper: one lora_alpha / r; patterns came between 0.29 and 0.33",
            "config",
            reads_rslora=True,
            max_rank=VLLM_RANKS[-1],
            default_max_rank=16,
            flag="--max-lora-rank",
            superseded=True,
        ),
        ServerProfile(
            "sglang",
            "0.5.23",
            "ran",
            "LoRAAdapter (scaling = lora_alpha / r), LoRAMemoryPool (torch.cat within a layer)",
            "config",
            mixed_ranks=False,
            flag="--max-lora-rank",
            experts_note=_SGLANG_EXPERTS,
        ),
        ServerProfile(
            "llama.cpp",
            "convert_lora_to_gguf.py of llama-cpp-python 0.3.36; node-llama-cpp 3.21.1",
            "ran",
            "llama-adapter.h, get_scale: alpha over the tensor's own rank; the converter stores one alpha",
            "own rank",
        ),
        ServerProfile(
            "ollama",
            "as read in 2026",
            "read",
            "its converter writes an integer alpha; llama.cpp's rule at run time",
            "own rank",
            integer_alpha=True,
            note="Its own conversion seems to permute the wrong factor of query and key projections: convert with "
            "`lorakit export ADAPTER out.gguf --format gguf` and use `ADAPTER out.gguf` in the Modelfile.",
        ),
        ServerProfile(
            "tensorrt-llm",
            "as read in 2026",
            "read",
            "its LoRA loader: alpha over the tensor's own rank",
            "own rank",
            reads_rslora=True,
            default_max_rank=64,
            flag="max_lora_rank",
            refuses=("lora_bias", "modules_to_save", "SPECLORA", "stacked experts"),
        ),
        ServerProfile("lorax", "0.12", "ran", _LORAX, "padded rank", mixed_ranks=False, kernel_multiple=16),
        ServerProfile("tgi", "3", "read", f"the same code as LoRAX: {_LORAX}", "padded rank", mixed_ranks=False,
                      kernel_multiple=16),
        ServerProfile(
            "mlx",
            "mlx-lm 0.32",
            "read",
            "adapters.safetensors with lora_a and lora_b transposed, and one scale",
            "one",
            mixed_ranks=False,
            own_format="mlx",
        ),
        ServerProfile(
            "diffusers",
            "0.42",
            "read",
            "without alphas or metadata in the file's header, alpha is the rank",
            "one",
            own_format="diffusers",
        ),
        ServerProfile(
            "comfyui",
            "as read in 2026",
            "read",
            "kohya's key names; .alpha over the tensor's own rank, 1 without .alpha",
            "one",
            own_format="kohya",
        ),
    )
}  # fmt: skip


def profile_of(name: str) -> ServerProfile:
    """The profile of a server. Raises: ValueError for an unknown name."""
    profile = PROFILES.get(str(name).strip().lower())
    if profile is None:
        raise ValueError(f"`server` must be one of {', '.join(PROFILES)}; got {name!r}.")
    return profile


def profiles_of(names: str | Iterable[str] | None) -> tuple[ServerProfile, ...]:
    """The profiles of several servers: names in a list, or in one string with commas between; None: no server."""
    if names is None:
        return ()
    return tuple(profile_of(name) for name in (names.split(",") if isinstance(names, str) else names))


def vllm_max_lora_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` with which vLLM serves an adapter of this rank; None where there is none.

    Example:
        >>> vllm_max_lora_rank(72), vllm_max_lora_rank(8), vllm_max_lora_rank(600)
        (128, 8, None)
    """
    return next((served for served in VLLM_RANKS if served >= rank), None)
