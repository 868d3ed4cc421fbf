"""Decoding against ``transformers`` and ``onnxruntime-genai``, of one LLaMA: the text weights of QLLaMA.

All read the same prompt of token ids (no image) and choose greedily, a fixed number of
tokens. The time of a further token is the time of all tokens less that of the first, in the same round.
``transformers`` runs ``generate`` with attention by ``scaled_dot_product_attention``; ``onnxruntime-genai``
runs its model builder's output for the same folder. Those that are not installed are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ivl_export.arrays import Ids
from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, Timed, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.config import QLlamaConfig
from ivl_export.profiles.measure.baseline import torch_threads
from ivl_export.runtime import InternVL
from ivl_export.runtime.captions import prefill, stepper
from ivl_export.sampling import StopCriteria, decode

BATCHES = (1, 8)
PROMPT = 64
UNKNOWN = 0
"""A token that no text of the training has."""
TRANSFORMERS, GENAI = "transformers", "onnxruntime_genai"
_GOALS = (
    Goal("runtime fp32", "transformers fp32", "speed", 1.5),
    Goal("runtime fp32", "genai fp32", "speed", 1.0),
    Goal("runtime int8", "genai int8", "speed", 1.0),
)
Generate = Callable[[int], Ids]
"""Makes that many new tokens [B, N] of a fixed prompt."""


def measure(setting: Setting) -> Iterator[Comparison]:
    """The first token, then each further one, at batch 1 and 8."""
    with torch_threads(setting.threads):
        for name in setting.models:
            for batch in BATCHES:
                with ExitStack() as opened:
                    ways = list(generators(setting, name, batch, opened))
                    case = f"{name}, batch {batch}, prompt of {PROMPT}"
                    yield from compared(case, ways, batch, setting, _GOALS)


def generators(
    setting: Setting, model: str, batch: int, opened: ExitStack
) -> Iterator[tuple[str, str, Generate]]:
    """(name, precision, what generates) of all that are installed; the first is the runtime in fp32."""
    config = open_checkpoint(setting.checkpoint(model)).config.qllama
    ids = prompts(config, batch)
    for precision in ("fp32", "int8"):
        ours = InternVL.load(setting.bundle(model, precision), threads=setting.threads)
        yield f"runtime {precision}", precision, partial(_ours, opened.enter_context(ours), config, ids)
    if find_spec(TRANSFORMERS) is None:
        return
    folder = llama_folder(setting, model)
    for precision in ("fp32", "bf16"):
        yield f"transformers {precision}", precision, _transformers(folder, precision, ids)
    if find_spec(GENAI) is None:
        return
    for precision in ("fp32", "int8"):
        genai = genai_folder(folder, precision, setting.threads)
        yield f"genai {precision}", precision, _genai(genai, ids)


def prompts(config: QLlamaConfig, batch: int) -> Ids:
    """Token ids [batch, :data:`PROMPT`], drawn from those after unk, bos and eos."""
    return np.random.default_rng(0).integers(3, config.vocab_size, (batch, PROMPT), dtype=np.int64)


def compared(
    case: str,
    ways: list[tuple[str, str, Generate]],
    batch: int,
    setting: Setting,
    goals: Sequence[Goal],
) -> list[Comparison]:
    """The first token and each further one of all ``ways`` (name, precision, what generates).

    ``goals`` count where both are there. Ways in fp32 must choose the same tokens (AssertionError).
    """
    new = setting.new_tokens
    timed = side_by_side(
        [
            Candidate(name, partial(call, tokens), precision, batch)
            for tokens in (1, new)
            for name, precision, call in ways
        ],
        setting.rounds,
    )
    first, whole = timed[: len(ways)], timed[len(ways) :]
    further = tuple(
        Timed(
            t.name,
            t.precision,
            batch,
            tuple(max(a - b, 1e-9) / (new - 1) for a, b in zip(w.seconds, t.seconds, strict=True)),
        )
        for t, w in zip(first, whole, strict=True)
    )
    names = {name for name, _, _ in ways}
    here = tuple(goal for goal in goals if {goal.of, goal.over} <= names)
    reference = ways[0][2](new)
    same = {name: float((call(new) == reference).mean()) for name, _, call in ways}
    wrong = [n for n, share in same.items() if n.endswith("fp32") and share < 1]
    if wrong:
        raise AssertionError(f"{case}: {wrong} chose other tokens: {same}")
    return [
        Comparison(f"{case}, the first token", first),
        Comparison(f"{case}, each further token", further, here, {"equal_tokens": same, "tokens": new}),
    ]


def _ours(model: InternVL, config: QLlamaConfig, ids: Ids, new: int) -> Ids:
    none = np.zeros((len(ids), config.num_attention_heads, 0, config.head_dim), np.float32)
    queries = {f"{kind}.{i}": none for kind in ("key", "value") for i in range(config.num_hidden_layers)}
    run = partial(model.components.run_device, "qllama_step")
    cache, logits = prefill(run, model.components.spec("qllama_step"), queries, ids, None, new)
    return decode(logits, stepper(run, cache), StopCriteria(-1, 0, new))


def llama_folder(setting: Setting, model: str) -> Path:
    """QLLaMA's text weights as a folder of ``LlamaForCausalLM``, made if it is not there."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = setting.work / f"{model}-llama"
    if folder.is_dir():
        return folder
    checkpoint = open_checkpoint(setting.checkpoint(model))
    q = checkpoint.config.qllama
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=q.vocab_size,
            hidden_size=q.hidden_size,
            intermediate_size=q.intermediate_size,
            num_hidden_layers=q.num_hidden_layers,
            num_attention_heads=q.num_attention_heads,
            num_key_value_heads=q.num_attention_heads,
            rms_norm_eps=q.rms_norm_eps,
            rope_theta=q.rope_theta,
            max_position_embeddings=q.max_position_embeddings,
            tie_word_embeddings=False,
        )
    )
    llama.load_state_dict({key: checkpoint.load(f"qllama.{key}").float() for key in llama.state_dict()})
    part = folder.with_name(f".{folder.name}.part")
    llama.save_pretrained(part)
    # The model builder needs a tokenizer; none is used here.
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(part)
    return part.replace(folder)


def _transformers(folder: Path, precision: str, ids: Ids) -> Generate:
    import torch
    from transformers import LlamaForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    llama.generation_config.eos_token_id = None
    llama.generation_config.pad_token_id = 0
    tokens = torch.from_numpy(ids)

    @torch.inference_mode()
    def generate(new: int) -> Ids:
        out = llama.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
        )
        return np.asarray(out[:, PROMPT:].numpy())

    return generate


def genai_folder(llama: Path, precision: str, threads: int) -> Path:
    """Folder of onnxruntime-genai's model builder for ``llama``, built if missing."""
    folder = llama.with_name(f"{llama.name}-genai-{precision}")
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.part")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", llama, "-o", part]
        command += ["-p", precision, "-e", "cpu", "-c", part.with_suffix(".cache")]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        part.replace(folder)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    config["model"]["eos_token_id"] = UNKNOWN  # or it would bar the one that the others may choose
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def _genai(folder: Path, ids: Ids) -> Generate:
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def generate(new: int) -> Ids:
        options = og.GeneratorParams(model)
        length = PROMPT + new
        options.set_search_options(max_length=length, min_length=length, batch_size=len(ids), do_sample=False)
        generator = og.Generator(model, options)
        generator.append_tokens(ids.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return np.stack([generator.get_sequence(row)[PROMPT:] for row in range(len(ids))]).astype(np.int64)

    return generate
