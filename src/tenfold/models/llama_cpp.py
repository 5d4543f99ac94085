"""Models as llama.cpp's converter writes them into GGUF files, and back: configuration, tokenizer, tensors.

The converter (`conversion/qwen.py` of llama.cpp) renames tensors and alters some of them, which is undone here:

* zero-centred norms have 1 added, and `A_log` is there as `-exp(A_log)`;
* the rows of `in_proj_qkvz`, which go by key head in the model, are two tensors: q, k and v of all heads, and z;
* the gate and up rows of the experts are two tensors, each of all experts;
* the module for multi-token prediction is one more layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tenfold.models import ARCHITECTURES, Config, Model
from tenfold.models.cache import FULL_ATTENTION, LINEAR_ATTENTION
from tenfold.models.gguf import GGUF, read_into, shortest
from tenfold.models.init import is_norm
from tenfold.models.layout import Filled, StoredTensor, check_fit
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.tokenizer import Tokenizer

LARGEST = 1 << 18  # of a model's dimensions, so that no product of three overflows
LONGEST = 1 << 32  # context, in tokens
MODEL_TYPES = {"qwen3next": "qwen3_next", "qwen3": "qwen3"}
SIZES = {  # fields of both configurations, and their keys behind the architecture's name
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
NEXT_SIZES = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
MTP_NAMES = {
    "nextn.eh_proj.weight": "mtp.fc.weight",
    "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "mtp.norm.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",  # of Qwen3-Next
    "ffn_norm.weight": "post_attention_layernorm.weight",  # of Qwen3
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight",  # the first converters left it whole
    "ssm_ba.weight": "linear_attn.in_proj_ba.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",  # of the converter's --fuse-gate-up-exps
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}


# ---- configuration -----------------------------------------------------------------------------------------


def read_configuration(file: GGUF) -> Config:
    """The configuration that the key-values describe; ValueError where it is nothing Tenfold knows."""
    architecture = file.get("general.architecture", str)
    if architecture not in MODEL_TYPES:
        raise ValueError(f"{file.path}: unknown architecture {architecture!r}, known are {', '.join(MODEL_TYPES)}")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: no token_embd.weight, so no whole model; take the file that has it")
    values = _shared_fields(file, architecture)
    values |= _next_fields(file) if architecture == "qwen3next" else _dense_fields(file)
    try:
        return ARCHITECTURES[MODEL_TYPES[architecture]][0].from_hf(values)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _shared_fields(file: GGUF, architecture: str) -> dict[str, object]:
    sizes = {field: file.count(f"{architecture}.{key}", LARGEST) for field, key in SIZES.items()}
    return {
        **sizes,
        "num_hidden_layers": _body_layers(file, architecture),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "max_position_embeddings": file.count(f"{architecture}.context_length", LONGEST),
        "rms_norm_eps": file.positive(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.positive(f"{architecture}.rope.freq_base"),
        "rope_scaling": _rope_scaling(file, f"{architecture}.rope"),
        "bos_token_id": _token_id(file, "bos"),
        "eos_token_id": _token_id(file, "eos"),
    }


def _dense_fields(file: GGUF) -> dict[str, object]:
    return {"intermediate_size": file.count("qwen3.feed_forward_length", LARGEST)}


def _next_fields(file: GGUF) -> dict[str, object]:
    sizes = {field: file.count(f"qwen3next.{key}", LARGEST) for field, key in NEXT_SIZES.items()}
    layers = _body_layers(file, "qwen3next")
    head_dim = file.count("qwen3next.attention.key_length", LARGEST)
    return {
        **sizes,
        "full_attention_interval": file.metadata.get("qwen3next.full_attention_interval"),  # without it 4
        "layer_types": _layer_types(file, layers),
        "linear_value_head_dim": file.count("qwen3next.ssm.inner_size", LARGEST) // sizes["linear_num_value_heads"],
        "partial_rotary_factor": file.count("qwen3next.rope.dimension_count", head_dim) / head_dim,
        "num_nextn_predict_layers": int(f"blk.{layers}.nextn.eh_proj.weight" in file.tensors),
    }


def _body_layers(file: GGUF, architecture: str) -> int:
    """The count of layers without those for multi-token prediction, which follow."""
    layers = file.count(f"{architecture}.block_count", len(file.tensors))
    key = f"{architecture}.nextn_predict_layers"
    return layers - (file.count(key, layers) if file.metadata.get(key) else 0)


def _layer_types(file: GGUF, layers: int) -> list[str] | None:
    """Each layer's kind in newer files; older ones have the interval alone, or leave it at the usual one."""
    key = "qwen3next.attention.recurrent_layers"
    if key not in file.metadata:
        return None
    return [LINEAR_ATTENTION if recurs else FULL_ATTENTION for recurs in file.get(key, list)[:layers]]


def _rope_scaling(file: GGUF, prefix: str) -> dict[str, object] | None:
    kind = file.metadata.get(f"{prefix}.scaling.type", "none")
    if kind == "none":
        return None
    keys = {name: f"{prefix}.scaling.{key}" for name, key in YARN.items()}
    return {"rope_type": kind} | {name: file.positive(key) for name, key in keys.items() if key in file.metadata}


def _token_id(file: GGUF, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return file.get(key, int) if key in file.metadata else None


# ---- tokenizer ---------------------------------------------------------------------------------------------


def has_tokenizer(file: GGUF) -> bool:
    """Whether there is one; the converter also writes files without."""
    return file.metadata.get("tokenizer.ggml.model", "none") != "none"


def read_tokenizer(file: GGUF) -> Tokenizer | None:
    """The tokenizer in the file, None where there is none; ValueError where it is of another kind than Qwen3's."""
    if not has_tokenizer(file):
        return None
    kind = file.metadata["tokenizer.ggml.model"], file.metadata.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "qwen2"):
        raise ValueError(f"{file.path}: a tokenizer of the kind {kind!r}, expected ('gpt2', 'qwen2'), as Qwen3 has it")
    tokens, types = file.texts("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise ValueError(f"{file.path}: {len(types)} types for {len(tokens)} tokens; convert the model again")
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    added = {token: types[i] == CONTROL for token, i in vocabulary.items() if types[i] in (CONTROL, USER_DEFINED)}
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in file.texts("tokenizer.ggml.merges"))]
    try:
        return Tokenizer.from_vocabulary(vocabulary, merges, added, _tokenizer_config(file, tokens))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _tokenizer_config(file: GGUF, tokens: list[str]) -> dict[str, object]:
    """What Hugging Face keeps in `tokenizer_config.json`."""
    ids = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    named = {name: _token_id(file, short) for name, short in ids.items()}
    config: dict[str, object] = {
        name: tokens[token] for name, token in named.items() if token is not None and 0 <= token < len(tokens)
    }
    template = file.metadata.get("tokenizer.chat_template")
    return config if template is None else config | {"chat_template": template}


# ---- tensors -----------------------------------------------------------------------------------------------


def named_tensors(file: GGUF, config: Config) -> dict[str, StoredTensor]:
    """The tensors under Hugging Face's names, or for parts of a parameter under such as it might have."""
    return {_model_name(name, config.num_hidden_layers): tensor for name, tensor in file.tensors.items()}


def _model_name(name: str, layers: int) -> str:
    """Hugging Face's name for one of llama.cpp's; an unknown one stays."""
    block = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(.+)", name)
    if block is None:
        return NAMES.get(name, name)
    layer, rest = int(block[1]), block[2]
    if layer == layers and rest in MTP_NAMES:
        return MTP_NAMES[rest]
    if rest not in LAYER_NAMES:
        return name
    place = f"model.layers.{layer}" if layer < layers else f"mtp.layers.{layer - layers}"
    return f"{place}.{LAYER_NAMES[rest]}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stored tensor and its place in a parameter: all of it, or spans of rows in each of several groups."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    groups: int = 1
    spans: tuple[tuple[int, int], ...] = ()  # first row in the group, number of rows

    def views(self, parameter: Tensor) -> list[Tensor]:
        """The views of the parameter that the stored rows fill, one view after the other."""
        if not self.spans:
            return [parameter]
        grouped = parameter.view(self.groups, -1, parameter.shape[-1])
        return [grouped.narrow(1, first, rows) for first, rows in self.spans]


def match_parts(held: Mapping[str, StoredTensor], model: Model, path: Path) -> list[Part]:
    """The place of every stored tensor that the model wants; ValueError where the two do not fit."""
    wanted = [
        part
        for name, parameter in model.named_parameters()
        for part in _parts(name, tuple(parameter.shape), model.config, whole=name in held)
    ]
    check_fit(held, {part.name: shortest(part.shape) for part in wanted}, model, path, "its metadata")
    return wanted


def _parts(name: str, shape: tuple[int, ...], config: Config, whole: bool) -> list[Part]:
    """The tensors that a parameter is in the file: two for the experts' gate and up, and for the DeltaNet's input."""
    if name.endswith("mlp.experts.gate_up_proj") and not whole:
        experts, width = shape[0], shape[1] // 2
        stem = name.removesuffix("gate_up_proj")
        spans = {f"{stem}gate_proj": ((0, width),), f"{stem}up_proj": ((width, width),)}
        return [
            Part(name=part, parameter=name, shape=(experts, width, shape[2]), groups=experts, spans=places)
            for part, places in spans.items()
        ]
    if name.endswith("in_proj_qkvz.weight") and not whole:
        assert isinstance(config, Qwen3NextConfig)
        return _projection_parts(name, shape[1], config)
    if name.endswith("conv1d.weight"):  # [C, 1, W] without the 1
        return [Part(name=name, parameter=name, shape=(shape[0], shape[2]))]
    return [Part(name=name, parameter=name, shape=shape)]


def _projection_parts(name: str, hidden: int, config: Qwen3NextConfig) -> list[Part]:
    """Of `[q K, k K, v rV, z rV]` for each key head, first q, k and v of all heads, then z of all."""
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // heads * config.linear_value_head_dim
    spans = {
        "in_proj_qkv": ((0, keys), (keys, keys), (2 * keys, values)),
        "in_proj_z": ((2 * keys + values, values),),
    }
    return [
        Part(
            name=name.replace("in_proj_qkvz", part),
            parameter=name,
            shape=(heads * sum(rows for _, rows in places), hidden),
            groups=heads,
            spans=places,
        )
        for part, places in spans.items()
    ]


def read_parts(
    parts: Sequence[Part], held: Mapping[str, StoredTensor], config: Config, state: Mapping[str, Tensor]
) -> Iterator[Filled]:
    """What goes where, part by part."""
    for part in parts:
        stored = held[part.name]
        for place, numbers, nbytes in read_into(part.views(state[part.parameter]), stored):
            yield Filled(part.parameter, place, _restored(part.parameter, numbers, config, stored.path), nbytes)


def _restored(name: str, numbers: Tensor, config: Config, path: Path) -> Tensor:
    """The parameter's own values, of what the converter made of them."""
    if name.endswith("A_log"):
        if not (numbers <= 0).all():
            raise ValueError(f"{path}: {name} holds numbers above 0, expected -exp(A_log); convert the model again")
        return (-numbers.float()).log()
    zero_centered = isinstance(config, Qwen3NextConfig) and not name.endswith("linear_attn.norm.weight")
    return numbers.float() - 1 if zero_centered and is_norm(name) else numbers
