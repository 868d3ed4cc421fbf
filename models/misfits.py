"""Explanations of weights that do not fit, by their names or the files next to them.

A state dict that was saved from a wrapper, an adapter that was never merged, a sharded training state and
quantised weights all end in hundreds of missing and surplus names. Each has its own remedy.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from ..errors import CapabilityError

Advice = tuple[str, str]
"""The cause and the remedy."""

_WRAPPERS = {
    "module.": "saved from DataParallel or DistributedDataParallel",
    "_orig_mod.": "saved from a model that torch.compile had wrapped",
    "_forward_module.": "saved from Lightning Fabric or DeepSpeed",
    "_fsdp_wrapped_module.": "saved from FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "saved with activation checkpointing around its layers",
    "base_model.model.": "saved from peft",
}
_QUANTISED = {
    "g_idx": "gptq",
    "qweight": "awq",
    "qzeros": "awq",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8",
    "weight_scale": "fp8",
}
"""Marks of quantised weights: the last part of a tensor's name, and its format."""
_INTEGERS = ("int8", "uint8", "int4", "uint4")
_LORA = re.compile(r".*(?:\.lora_[AB]\.|lora_embedding_|\.base_layer\.|\.modules_to_save\.|lora_magnitude).*")
_STRIP = (
    'from safetensors.torch import load_file, save_file; t = load_file("model.safetensors"); '
    'save_file({{k.replace("{0}", ""): v for k, v in t.items()}}, "model.safetensors")'
)


def explain_wrapper(names: Collection[str]) -> Advice | None:
    """Why tensors of these ``names`` are not plain weights of any model; None if they may be."""
    if adapter := [name for name in names if _LORA.fullmatch(name)]:
        return (
            f"It holds LoRA adapters, for example {adapter[0]}.",
            "Merge them first (peft: merge_and_unload; OpenGVLab: tools/merge_lora.py), and give the result.",
        )
    for part, why in _WRAPPERS.items():
        names_inside = [name for name in names if f".{part}" in f".{name}"]
        if names_inside and all(name.startswith(part) for name in names):
            return f"All names begin with {part}, for it was {why}.", _strip(part)
        if names_inside and part != "module.":  # which may be a layer's own name
            return f"{len(names_inside)} names hold {part}, as {names_inside[0]}, for it was {why}.", _strip(
                part
            )
    return None


def explain_names(names: Collection[str], expected: Collection[str]) -> Advice | None:
    """Why the stored ``names`` are not the ``expected`` ones; None: unknown."""
    target = set(expected)
    if prefix := _surplus_prefix(names, target):
        return f"All names begin with {prefix}, a prefix that this model's have not.", _strip(prefix)
    if prefix := _surplus_prefix(target, set(names)):
        return (
            f"The names lack the prefix {prefix}: they are a part of a model.",
            "Give the checkpoint of the whole model.",
        )
    return None


def _strip(part: str) -> str:
    return f"Strip it: python -c '{_STRIP.format(part)}'"


def refuse_quantised(how: object, source: str) -> NoReturn:
    """CapabilityError that says in which format a checkpoint is quantised.

    Args:
        how: a config's ``quantization_config``, or the format's name.
        source: the checkpoint, or its config.
    """
    method = how.get("quant_method") or how.get("quant_algo") if isinstance(how, dict) else how
    name = str(method or "unknown").lower()
    article = "an" if name[:1] in "aeio" else "a"
    shown = {"awq": "an AWQ", "gptq": "a GPTQ", "fp8": "an FP8", "nvfp4": "an NVFP4"}
    shown_as = shown.get(name, f"{article} {name}")
    raise CapabilityError(
        f"{source} is {shown_as} checkpoint: its weights are quantised already.",
        "Engines are built of the weights they were quantised from, which are rounded once.",
        "Give the checkpoint in bf16, fp16 or fp32 that it was made from.",
    )


def check_unquantised(types: Mapping[str, str], source: str) -> None:
    """CapabilityError where the names or types of tensors (name -> type) are a quantised checkpoint's."""
    endings = {name.rpartition(".")[2] for name in types}
    for ending, method in _QUANTISED.items():
        if ending in endings:
            refuse_quantised("gptq" if "g_idx" in endings else method, source)
    low = [kind for kind in types.values() if "float8" in kind or kind in _INTEGERS]
    if low:
        refuse_quantised("fp8" if "float8" in low[0] else low[0], source)


def explain_folder(folder: Path) -> Advice | None:
    """Why a folder has no weights, by the files that it has; None: unknown."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return None
    for pattern, advice in _FOLDERS:
        if matches := [name for name in names if re.fullmatch(pattern, name)]:
            why, fix = advice
            return why.format(matches[0]), fix.format(matches[-1])
    return None


_FOLDERS: tuple[tuple[str, Advice], ...] = (
    (
        r"adapter_(?:model|config)\..*",
        (
            "It has {0}: a LoRA adapter, which changes a base model and is none itself.",
            "Merge it into its base model first (peft: merge_and_unload), save that, and give its folder.",
        ),
    ),
    (
        r"zero_to_fp32\.py|zero_pp_rank_.*|bf16_zero_pp_rank_.*|mp_rank_.*|global_step\d+",
        (
            "It has {0}: the ZeRO shards of a DeepSpeed training, not weights.",
            "Join them: python zero_to_fp32.py . pytorch_model.bin",
        ),
    ),
    (
        r".*\.distcp|\.metadata|pytorch_model_fsdp.*",
        (
            "It has {0}: a distributed checkpoint of torch (FSDP).",
            "Join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch . pytorch_model.bin",
        ),
    ),
    (
        r".*\.(?:incomplete|part|aria2|crdownload)",
        ("It has {0}: an incomplete download.", "Download it again: it continues."),
    ),
    (
        r"(?:model|pytorch_model)-\d+-of-\d+\.(?:safetensors|bin)",
        (
            "It has {0}, but no index that says which shard has which tensor.",
            "Download the model.safetensors.index.json (or pytorch_model.bin.index.json) next to them.",
        ),
    ),
    (
        r"mm_projector\.bin|non_lora_trainables\.bin",
        (
            "It has {0}: the tensors that a LLaVA training stage changed, without the model.",
            "Merge it into its base model (LLaVA's load_pretrained_model, then save_pretrained).",
        ),
    ),
    (
        r"checkpoint-\d+",
        ("It has {0}: folders of a training, each a separate checkpoint.", "Give one of them: .../{0}"),
    ),
    (
        r".*\.gguf",
        ("It has {0}: a GGUF file, whose weights are quantised.", "Give the checkpoint it was made from."),
    ),
    (
        r"tf_model\.h5|flax_model\.msgpack|.*\.ckpt\.index",
        (
            "It has {0}: weights of TensorFlow or Flax.",
            "Save them from transformers: from_pretrained(..., from_tf=True or from_flax=True), then "
            "save_pretrained.",
        ),
    ),
    (
        r"manifest\.json",
        ("It has {0}: a bundle that was built already.", "Give the checkpoint it was built from."),
    ),
)


def explain_dict(keys: Iterable[str], tensors_in: Mapping[str, int]) -> Advice | None:
    """Why a torch file is not a plain state dict, by its top-level ``keys``.

    Args:
        keys: all of them.
        tensors_in: those that are dictionaries of tensors, with how many.
    """
    if not tensors_in:
        return None
    key, count = max(tensors_in.items(), key=lambda item: item[1])
    return (
        f"It is a training state with {', '.join(sorted(keys)[:8])}; {count} tensors are under {key!r}.",
        f"Save them alone: torch.save(torch.load(path, weights_only=True)[{key!r}], path)",
    )


def _fits(names: Iterable[str], expected: set[str]) -> bool:
    """Whether nearly all ``names`` are expected."""
    listed = list(names)
    return bool(listed) and sum(name in expected for name in listed) >= 0.9 * len(listed)


def _surplus_prefix(names: Collection[str], expected: set[str]) -> str:
    """Up to three dotted parts that all ``names`` begin with, without which they are expected; else empty."""
    if not names:
        return ""
    first = min(names, key=len).split(".")
    for count in range(1, min(4, len(first))):
        prefix = ".".join(first[:count]) + "."
        plain = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if len(plain) == len(names) and _fits(plain, expected):
            return prefix
    return ""
