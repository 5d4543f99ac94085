"""The native runner: right against torch, and the same bits however the tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tenfold.kernels import cpu
from tenfold.models import Config, Model
from tenfold.models.native import NativeModel, load_native
from tenfold.models.native_cache import PAGE, NativeCache
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import save_model
from tests.models.native_models import new_model, one_native_thread

__all__ = ["one_native_thread"]  # a fixture for all tests of this file

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

NEXT = Qwen3NextConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=5,
    mlp_only_layers=(1,),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=32,
    num_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
CONFIGS: dict[str, Config] = {
    "next": NEXT,
    "next-tied-wide-shared": replace(NEXT, tie_word_embeddings=True, shared_expert_intermediate_size=80),
    "next-narrow-shared-mtp": replace(NEXT, shared_expert_intermediate_size=16, num_nextn_predict_layers=1),
    "next-attention-only": replace(NEXT, full_attention_interval=1, norm_topk_prob=False),
    "dense": Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
}
CONFIGS["dense-tied"] = replace(CONFIGS["dense"], tie_word_embeddings=True)
TOKENS = torch.randint(300, (75,), generator=torch.Generator().manual_seed(7))

# Relative error (Frobenius) of a product: its inputs rounded to int8 in groups of 32, or to bf16 on instruction sets
# that multiply bf16 (tests/kernels/test_linear.py). Those of a model's products are independent, so they add up in
# squares: in a layer eight, since a mixer multiplies four projections (q, k, v and a gate) before its last product, and
# a feed-forward two; and the head's. No block's output is larger than the residual stream that it ends in.
PRODUCT = {"bf16": 0.0025, "int8": 0.007, "int4": 0.007}


def tolerance(config: Config, format: str) -> float:
    return PRODUCT[format] * (8 * config.num_hidden_layers + 1) ** 0.5


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Config:
    return CONFIGS[request.param]


def pack(model: Model, format: str) -> NativeModel:
    return NativeModel.pack(model.config, model.named_parameters(), format)


def all_logits(model: NativeModel, tokens: Tensor) -> Tensor:
    return model.logits(model.hidden_states(tokens.tolist(), NativeCache(model.config, torch.float32)))


def memory_of(cache: NativeCache) -> Tensor:
    pages, states = cache.pool.pages, cache.pool.states
    return torch.cat([*(pages.read(i) for i in range(pages.count)), states.read(0)])


def unpack_into(model: Model, packed: NativeModel) -> None:
    """Gives the torch model the values that the packed weights stand for."""
    parameters = dict(model.named_parameters())
    put_rows(parameters["model.embed_tokens.weight"], packed.embedding)
    if not model.config.tie_word_embeddings:
        put_rows(parameters["lm_head.weight"], packed.head)
    for i, layer in enumerate(packed.layers):
        place = f"model.layers.{i}"
        for name, weight in layer.packed.matrices.items():
            parameters[f"{place}.{name}"].copy_(cpu.unpack(weight))
        if layer.packed.experts is not None:
            put_experts(parameters, f"{place}.mlp", layer.packed.experts)


def put_rows(parameter: Parameter, parts: Sequence[cpu.PackedLinear]) -> None:
    parameter.copy_(torch.cat([cpu.unpack(part) for part in parts]))


def put_experts(parameters: dict[str, Parameter], place: str, experts: cpu.PackedExperts) -> None:
    count = len(parameters[f"{place}.experts.down_proj"])
    unpacked = [cpu.unpack_expert(experts, e) for e in range(experts.shape[0])]
    for e, (gate, up, down) in enumerate(unpacked[:count]):
        parameters[f"{place}.experts.gate_up_proj"][e].copy_(torch.cat((gate, up)))
        parameters[f"{place}.experts.down_proj"][e].copy_(down)
    for i, (name, axis) in enumerate((("gate", 0), ("up", 0), ("down", 1))):
        shared = parameters[f"{place}.shared_expert.{name}_proj.weight"]
        whole = torch.cat([parts[i] for parts in unpacked[count:]], axis)
        shared.copy_(whole.narrow(axis, 0, shared.shape[axis]))


@torch.no_grad()
@pytest.mark.parametrize("format", cpu.FORMATS)
def test_logits_are_those_of_torch_on_the_unpacked_weights(config: Config, format: str) -> None:
    model = new_model(config)
    packed = pack(model, format)
    found = all_logits(packed, TOKENS)
    if format != "bf16":  # which holds the weights as they are
        unpack_into(model, packed)
    expected = model(TOKENS[None])[0]
    same_experts = (found - expected).norm(dim=1) / expected.norm(dim=1) < 5 * tolerance(config, format)
    assert same_experts.float().mean() > 0.9  # a near-tie of the router may fall the other way
    error = (found - expected)[same_experts].norm() / expected[same_experts].norm()
    assert error < tolerance(config, format)


@pytest.mark.parametrize("format", cpu.FORMATS)
@pytest.mark.parametrize("chunks", [[1] * 75, [74, 1], [1, 74], [31, 1, 32, 11], [64, 11]], ids=len)
def test_chunks_of_any_size_give_the_same_bits(config: Config, format: str, chunks: Sequence[int]) -> None:
    model = pack(new_model(config), format)
    whole, cut = model.new_cache(), model.new_cache()
    expected = model.hidden_states(TOKENS.tolist(), whole)
    found = torch.cat([model.hidden_states(chunk.tolist(), cut) for chunk in TOKENS.split(list(chunks))])
    assert torch.equal(found, expected)
    assert cut.length == whole.length == 75
    assert torch.equal(memory_of(cut), memory_of(whole))


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_threads_do_not_change_bits(config: Config, format: str) -> None:
    model = pack(new_model(config), format)
    alone = all_logits(model, TOKENS)
    cpu.set_threads(2)
    assert torch.equal(all_logits(model, TOKENS), alone)


def test_a_long_prompt_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack(new_model(NEXT), "int8")
    prompt = TOKENS.repeat(8).tolist()
    whole, cut = model.new_cache(), model.new_cache()
    expected = model.logits(model.hidden_states(prompt, whole))[-1]
    monkeypatch.setattr("tenfold.models.native.PREFILL_TOKENS", 99)
    assert torch.equal(model.next_logits(prompt, cut), expected)
    assert cut.length == 600 > 2 * PAGE * 8  # room was made more than once
    assert torch.equal(model.next_logits([5], cut), model.logits(model.hidden_states([5], whole))[0])


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_a_folder_is_packed_as_it_is_read(config: Config, format: str, tmp_path: Path) -> None:
    model = new_model(config)
    save_model(model, tmp_path)
    loaded, tokenizer = load_native(tmp_path, format)
    assert tokenizer is None
    assert torch.equal(all_logits(loaded, TOKENS), all_logits(pack(model, format), TOKENS))


def test_parameters_in_any_order() -> None:
    model = new_model(NEXT)
    backwards = NativeModel.pack(NEXT, reversed(list(model.named_parameters())), "int4")
    assert torch.equal(all_logits(backwards, TOKENS), all_logits(pack(model, "int4"), TOKENS))


def test_bytes_are_counted() -> None:
    model, dense = pack(new_model(NEXT), "int8"), pack(new_model(CONFIGS["dense"]), "int4")
    expert = 2 * 4096  # 3 * 64 * 32 numbers of int8 and a scale for each 32 of them, in whole pages
    idle = 4 * (7 - 3) * expert
    assert model.nbytes() - sum(part.nbytes for part in model.embedding) - model.bytes_per_token() == idle
    assert dense.nbytes() - sum(part.nbytes for part in dense.embedding) == dense.bytes_per_token()


@pytest.mark.parametrize(
    ("config", "format", "message"),
    [
        (NEXT, "int3", "unknown format 'int3': bf16, int8, int4"),
        (replace(NEXT, hidden_size=48), "int8", "multiples of 32"),
        (replace(NEXT, moe_intermediate_size=24), "int4", "multiples of 32"),
    ],
)
def test_what_the_kernels_lack_is_refused(config: Config, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(new_model(config), format)
