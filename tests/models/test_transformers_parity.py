"""Tenfold computes what transformers computes, and each reads what the other wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.models import Model
from tenfold.models.cache import Cache
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tenfold.models.weights import load_model, save_model

transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5  # of logits, relative: fp32 products summed in another order; measured: up to 4e-6

NEXT_BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,  # so that norms do not enlarge the rounding of outputs near zero a thousandfold
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e5,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.5,
}
NEXT: dict[str, dict[str, Any]] = {
    "base": {},
    "tied, odd experts, top-k as it comes": {
        "tie_word_embeddings": True,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "vocab_size": 61,
    },
    "some layers dense": {"mlp_only_layers": [1, 3], "hidden_size": 48, "num_key_value_heads": 4},
    "every second layer sparse": {
        "decoder_sparse_step": 2,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "intermediate_size": 28,
        "num_experts_per_tok": 8,
    },
    "YaRN, half of each head rotated": {"rope_parameters": YARN, "head_dim": 24, "num_attention_heads": 2},
    "layers as listed, short conv, wide values": {
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "num_hidden_layers": 3,
        "linear_conv_kernel_dim": 3,
        "linear_value_head_dim": 20,
        "linear_key_head_dim": 12,
    },
    "whole heads rotated, three value heads a key head": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 1.0},
        "num_key_value_heads": 1,
        "linear_num_value_heads": 6,
        "num_experts": 17,
        "num_experts_per_tok": 1,
        "rms_norm_eps": 1e-2,
        "full_attention_interval": 2,
        "num_hidden_layers": 5,
    },
}
DENSE_BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
DENSE: dict[str, dict[str, Any]] = {
    "base": {},
    "tied, one key head": {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 12},
    "YaRN": {"rope_parameters": {k: v for k, v in YARN.items() if k != "partial_rotary_factor"}},
}
CASES = [
    pytest.param(kind, base | changes, id=f"{kind}: {name}")
    for kind, base, all_changes in (("qwen3_next", NEXT_BASE, NEXT), ("qwen3", DENSE_BASE, DENSE))
    for name, changes in all_changes.items()
]


def their_model(kind: str, settings: dict[str, Any]) -> Any:
    """A model of transformers in which no parameter has a value that hides a mistake."""
    configs = {"qwen3_next": transformers.Qwen3NextConfig, "qwen3": transformers.Qwen3Config}
    models = {"qwen3_next": transformers.Qwen3NextForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}
    torch.manual_seed(0)
    model = models[kind](configs[kind](**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.normal_(0, 0.5 if "gate.weight" in name or "conv1d" in name else 0.15)
    return model


def tokens(vocab_size: int) -> Tensor:
    """Two rows, long enough that the delta rule works in more than one chunk."""
    return torch.randint(0, vocab_size, (2, 83), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_logits(model: Any, input_ids: Tensor) -> Tensor:
    return model(input_ids, use_cache=False).logits


@torch.no_grad()
def our_logits(model: Model, input_ids: Tensor) -> Tensor:
    return model(input_ids)


def assert_same_state(found: Any, expected: Any) -> None:
    """Two models of transformers hold the same bits."""
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Logits agree as well as fp32 lets them."""
    assert (found - expected).norm() < TOLERANCE * expected.norm()


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_both_ways(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs, input_ids = their_model(kind, settings), tokens(settings["vocab_size"])
    expected = their_logits(theirs, input_ids)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    ours = load_model(tmp_path / "theirs")
    assert_close(our_logits(ours, input_ids), expected)
    for layout in ("separate", "stacked"):
        save_model(ours, tmp_path / layout, experts=layout, shard_bytes=40_000)
        again = type(theirs).from_pretrained(tmp_path / layout)
        assert_same_state(again, theirs)
        assert_close(their_logits(again, input_ids), expected)  # not equal: alignment steers kernels


@torch.no_grad()
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_cache_equals_one_pass(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    their_model(kind, settings).save_pretrained(tmp_path)
    model, input_ids = load_model(tmp_path), tokens(settings["vocab_size"])
    expected = model(input_ids)
    cache = Cache(model.config, len(input_ids))
    parts = input_ids.split([1, 2, 67, *[1] * 13], 1)  # a token, a few, more than a chunk, then one at a time
    found = [model(part, cache=cache) for part in parts]
    assert cache.length == input_ids.shape[1]
    assert_close(torch.cat(found, 1), expected)


def test_transformers_reads_a_folder_with_multi_token_prediction(tmp_path: Path) -> None:
    theirs = their_model("qwen3_next", NEXT_BASE)
    theirs.save_pretrained(tmp_path / "theirs")
    body = load_model(tmp_path / "theirs")
    with_mtp = _with_mtp(body)
    save_model(with_mtp, tmp_path / "mtp")
    again, report = type(theirs).from_pretrained(tmp_path / "mtp", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert_same_state(again, theirs)
    again.save_pretrained(tmp_path / "dropped")  # transformers drops mtp.* and may keep the mention of it
    assert load_model(tmp_path / "dropped").mtp is None


def _with_mtp(body: Model) -> Model:
    assert isinstance(body.config, Qwen3NextConfig)
    model = Qwen3Next(replace(body.config, num_nextn_predict_layers=1))
    model.init_weights(torch.Generator().manual_seed(0))
    model.load_state_dict(body.state_dict(), strict=False)
    return model


def test_configuration_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    theirs = their_model("qwen3_next", NEXT_BASE | {"rope_parameters": YARN})
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    values |= {"rope_scaling": rope, "torch_dtype": values.pop("dtype"), "full_attention_interval": 4}
    del values["layer_types"]
    path.write_text(json.dumps(values))
    input_ids = tokens(97)
    assert_close(our_logits(load_model(tmp_path), input_ids), their_logits(theirs, input_ids))
