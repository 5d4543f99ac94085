"""What the loss promises: documents do not see each other, parts add up to the whole, and balance means balance."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

from tenfold.models import ARCHITECTURES, Config, Model
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.ops.moe import RouterLoad, route
from tenfold.train.objective import (
    Forward,
    balance_loss,
    count_labels,
    forward,
    labels_ahead,
    router_counts,
    stack_counts,
)

DOCUMENTS = (70, 3, 1, 54)  # tokens: longer than a chunk of the delta rule, shorter than the conv, one, any
ROUNDING = 2 * 128 * 2**-24  # relative: fp32 sums over 128 tokens, of sums, in another order
MODELS = [  # family, MTP steps
    pytest.param("sparse", 2, id="qwen3_next"),
    pytest.param("dense", 0, id="qwen3"),
]


def fresh(config: Config) -> Model:
    """A model whose router and outputs are far from uniform."""
    model = ARCHITECTURES[config.model_type][1](replace(config, initializer_range=0.2))  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def document_batch(lengths: tuple[int, ...], vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, next tokens and borders of documents of these lengths, `[1, T]`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (1, sum(lengths)), generator=generator)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    labels = ids.roll(-1)
    labels[0, borders[1:].long() - 1] = -100
    return ids, labels, borders


def alone(batch: tuple[Tensor, Tensor, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each document as a batch of its own."""
    ids, labels, borders = batch
    spans = pairwise(borders.tolist())
    return [(ids[:, a:b], labels[:, a:b], torch.tensor([0, b - a], dtype=torch.int32)) for a, b in spans]


def summed(parts: list[Forward]) -> Forward:
    """What several forward passes add up to."""
    loads = [
        RouterLoad(sum((p for p, _ in layer), torch.zeros(())), sum((c for _, c in layer), torch.zeros(())))
        for layer in zip(*(part.loads for part in parts), strict=True)
    ]
    return Forward(*(torch.stack([part[i] for part in parts]).sum() for i in range(2)), loads)  # type: ignore[arg-type]


def gradients(model: Model, out: Forward) -> dict[str, Tensor]:
    """Of all parts of the loss, the balance one included."""
    model.zero_grad()
    total = out.loss + 0.3 * out.mtp_loss
    if out.loads:
        total = total + balance_loss(out.loads, stack_counts(out.loads), sum(DOCUMENTS))
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= ROUNDING * expected.norm())


@pytest.mark.parametrize(("family", "mtp_steps"), MODELS)
def test_packed_documents_are_separate_documents(family: str, mtp_steps: int, request: pytest.FixtureRequest) -> None:
    model = fresh(request.getfixturevalue(family))
    batch = document_batch(DOCUMENTS, model.config.vocab_size)
    packed = forward(model, *batch, mtp_steps)
    expected = gradients(model, packed)
    separate = summed([forward(model, *document, mtp_steps) for document in alone(batch)])
    assert same(packed.loss, separate.loss) and same(packed.mtp_loss, separate.mtp_loss)
    assert (packed.mtp_loss > 0) == (mtp_steps > 0)
    assert [load.counts.tolist() for load in packed.loads] == [load.counts.tolist() for load in separate.loads]
    found = gradients(model, separate)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert same(found[name], gradient), name


@pytest.mark.parametrize(("family", "mtp_steps"), MODELS)
def test_a_document_changes_nothing_in_the_next(family: str, mtp_steps: int, request: pytest.FixtureRequest) -> None:
    model = fresh(request.getfixturevalue(family))
    ids, labels, borders = document_batch(DOCUMENTS, model.config.vocab_size)
    only_last = labels.clone()
    only_last[:, : sum(DOCUMENTS[:-1])] = -100
    other = ids.clone()
    other[:, : sum(DOCUMENTS[:-1])] = (other[:, : sum(DOCUMENTS[:-1])] + 7) % model.config.vocab_size
    first, second = (forward(model, x, only_last, borders, mtp_steps) for x in (ids, other))
    assert first.loss == second.loss and first.mtp_loss == second.mtp_loss


@torch.no_grad()
def test_the_losses_are_cross_entropies_of_logits(sparse: Qwen3NextConfig) -> None:
    model = fresh(sparse)
    ids, labels, borders = document_batch(DOCUMENTS, sparse.vocab_size)
    out = forward(model, ids, labels, borders, mtp_steps=2)
    hidden, _ = model.hidden_states(ids, cu_seqlens=borders)
    expected = F.cross_entropy((hidden @ model.output_weight.T)[0], labels[0], reduction="sum")
    assert same(out.loss, expected)
    mtp = torch.zeros(())
    for step, (state, _) in enumerate(model.draft_states(ids, hidden, 2, borders), start=1):  # type: ignore[operator]
        logits = (state @ model.output_weight.T)[0]
        for a, b in pairwise(borders.tolist()):
            for t in range(a, b - step - 1):  # the hidden state at t and the tokens up to t + step tell t + step + 1
                mtp += F.cross_entropy(logits[t], ids[0, t + step + 1])
    assert same(out.mtp_loss, mtp)


@st.composite
def packed_labels(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Documents of labels that fill rows, the number of rows, and how far to look."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    documents: list[list[int]] = []
    for _ in range(rows):
        left = length
        while left:
            size = draw(st.integers(1, left))
            documents.append(draw(st.lists(st.sampled_from([-100, 1, 2, 3]), min_size=size, max_size=size)))
            left -= size
    return documents, rows, draw(st.integers(1, 4))


@given(packed_labels())
def test_labels_ahead_are_those_of_a_loop(drawn: tuple[list[list[int]], int, int]) -> None:
    documents, rows, step = drawn
    labels = torch.tensor([x for document in documents for x in document]).view(rows, -1)
    borders = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    expected = [
        document[t + step] if t + step < len(document) else -100 for document in documents for t in range(len(document))
    ]
    assert labels_ahead(labels, borders, step).flatten().tolist() == expected
    counts = count_labels(labels, borders, step)
    every = [
        document[t + s]
        for document in documents
        for t in range(len(document))
        for s in range(step + 1)
        if t + s < len(document)
    ]
    assert counts.next_token == sum(x != -100 for document in documents for x in document)
    assert counts.next_token + counts.mtp == sum(x != -100 for x in every)


# ---- balance -----------------------------------------------------------------------------------------------


def random_loads(layers: int, tokens: int, experts: int, k: int) -> tuple[list[Tensor], list[RouterLoad]]:
    generator = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(tokens, experts, generator=generator) for _ in range(layers)]
    return logits, [route(x, k, normalize=True)[2] for x in logits]


def test_balance_is_one_where_it_is_perfect_and_more_elsewhere() -> None:
    even = RouterLoad(torch.full((8,), 100 / 8), torch.full((8,), 25))
    assert balance_loss([even, even], stack_counts([even, even]), tokens=100) == 1.0
    one_for_all = RouterLoad(torch.eye(8)[0] * 100, torch.eye(8, dtype=torch.int64)[0] * 100)
    assert balance_loss([one_for_all], stack_counts([one_for_all]), tokens=100) == 8.0
    assert balance_loss([even, one_for_all], stack_counts([even, one_for_all]), tokens=100) == 4.5


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_that_of_transformers_divided_by_the_choices_of_a_token(k: int) -> None:
    (logits,), loads = random_loads(layers=1, tokens=50, experts=7, k=k)
    theirs = load_balancing_loss_func((logits,), num_experts=7, top_k=k)
    assert isinstance(theirs, Tensor)
    ours = balance_loss(loads, stack_counts(loads), tokens=50)
    assert float(ours) * k == pytest.approx(float(theirs), rel=1e-6)  # they count k choices as k tokens


def test_parts_of_a_batch_add_up_to_its_balance_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 7, generator=generator, requires_grad=True)
    whole = [route(logits, 2, normalize=True)[2]]
    counts = stack_counts(whole)
    expected = balance_loss(whole, counts, tokens=60)
    (gradient,) = torch.autograd.grad(expected, logits)
    parts = [balance_loss([route(part, 2, normalize=True)[2]], counts, 60) for part in logits.split([10, 45, 5])]
    total = torch.stack(parts).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert same(torch.autograd.grad(total, logits)[0], gradient)
    assert gradient.norm() > 0


def test_choices_are_counted_as_the_forward_pass_makes_them(sparse: Qwen3NextConfig) -> None:
    model = fresh(sparse)
    ids, labels, borders = document_batch(DOCUMENTS, sparse.vocab_size)
    loads = forward(model, ids, labels, borders, mtp_steps=2).loads
    counts = router_counts(model, ids, borders, mtp_steps=2)
    assert torch.equal(counts, stack_counts(loads))
    assert counts.shape == (sparse.num_hidden_layers + 2, sparse.num_experts)  # the MTP layer once for each step
    assert counts.sum(-1).tolist() == [sum(DOCUMENTS) * sparse.num_experts_per_tok] * len(counts)
