"""Cross-entropy in chunks is torch's, in value and gradients, wherever the chunks end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from tenfold.ops import cross_entropy
from tenfold.ops.cross_entropy import IGNORE, linear_cross_entropy, naive_linear_cross_entropy

EXACT = 1e-12  # fp64 sums in another order, of up to 65 tokens; measured: up to 1e-15
SINGLE = 5e-6  # the same in fp32, against fp64, relative; measured: up to 5e-7
VOCABULARY = 11
ROW = 4 * VOCABULARY  # bytes of a token's logits


def draw(tokens: int, hidden: int = 6, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight in fp64, and labels of which a share is left out."""
    h, weight = (torch.randn(n, hidden, dtype=torch.float64, requires_grad=True) for n in (tokens, VOCABULARY))
    labels = torch.randint(VOCABULARY, (tokens,)).masked_fill(torch.rand(tokens) < ignored, IGNORE)
    return h, weight, labels


@pytest.fixture(params=[1, 3, 64, 10**6], ids=lambda rows: f"chunks of {rows}")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", ROW * request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65])
def test_value_and_gradients_are_torchs(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    h, weight, labels = draw(tokens)
    loss = F.cross_entropy(h @ weight.T, labels, reduction="sum", ignore_index=IGNORE)
    expected = loss, *torch.autograd.grad(loss, (h, weight))
    h, weight = (x.detach().to(dtype).requires_grad_() for x in (h, weight))
    loss = linear_cross_entropy(h, weight, labels)
    found = loss, *torch.autograd.grad(loss, (h, weight))
    assert all(x.dtype == dtype for x in found)
    assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_definition_is_torchs() -> None:
    h, weight, labels = draw(9)
    log_p = (h @ weight.T).log_softmax(-1)
    expected = -sum(log_p[t, label] for t, label in enumerate(labels.tolist()) if label != IGNORE)
    assert_close(naive_linear_cross_entropy(h, weight, labels), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "hidden", "weight"])
def test_gradients_are_finite_differences(wanted: tuple[bool, bool]) -> None:
    h, weight, labels = draw(5)
    inputs = [x.detach().requires_grad_(needed) for x, needed in zip((h, weight), wanted, strict=True)]
    assert gradcheck(lambda h, weight: linear_cross_entropy(h, weight, labels) * 0.7, inputs)


def test_backward_twice_gives_the_same_gradients() -> None:
    h, weight, labels = draw(5)
    loss = linear_cross_entropy(h, weight, labels)
    once = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    assert_close(torch.autograd.grad(loss, (h, weight)), once, rtol=0.0, atol=0.0)


@pytest.mark.usefixtures("chunks")
def test_micro_batches_add_up() -> None:
    h, weight, labels = draw(65)
    parts = linear_cross_entropy(h[:9], weight, labels[:9]) + linear_cross_entropy(h[9:], weight, labels[9:])
    assert_close(parts, linear_cross_entropy(h, weight, labels), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("tokens", [0, 7])
def test_without_labels_loss_and_gradients_are_zero(tokens: int) -> None:
    h, weight, labels = draw(tokens, ignored=2.0)
    loss = linear_cross_entropy(h, weight, labels)
    assert loss.item() == 0.0
    assert not any(x.any() for x in torch.autograd.grad(loss, (h, weight)))


def test_loss_is_the_same_where_no_gradient_is_needed() -> None:
    h, weight, labels = draw(65)
    loss = linear_cross_entropy(h, weight, labels)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(h, weight, labels), loss)
    assert not linear_cross_entropy(h.detach(), weight.detach(), labels).requires_grad


@pytest.mark.parametrize("size", [0.0, 1e4, 1e15], ids=["all alike", "large", "huge"])
def test_extreme_logits_stay_finite_and_right_in_fp32(size: float) -> None:
    h, weight, labels = draw(9)
    h, weight = (x.detach().float().requires_grad_() for x in (size * h, weight))
    loss = linear_cross_entropy(h, weight, labels)
    expected = naive_linear_cross_entropy(h.double(), weight.double(), labels)
    assert_close(loss, expected, rtol=SINGLE, atol=SINGLE, check_dtype=False)
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, (h, weight)))


def test_autocast_multiplies_in_half_precision_and_adds_in_fp32() -> None:
    h, weight, labels = draw(9)
    h, weight = (x.detach().float().requires_grad_() for x in (h, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(h, weight, labels)
    gradients = torch.autograd.grad(loss, (h, weight))
    assert loss.dtype == torch.float32 and all(x.dtype == torch.float32 for x in gradients)
    half_h, half_weight = (x.detach().bfloat16().requires_grad_() for x in (h, weight))
    expected = linear_cross_entropy(half_h, half_weight, labels)
    assert torch.equal(loss, expected)
    expected_gradients = torch.autograd.grad(expected, (half_h, half_weight))
    assert_close(gradients, expected_gradients, rtol=0.0, atol=0.0, check_dtype=False)
    definition = naive_linear_cross_entropy(half_h.double(), half_weight.double(), labels)
    assert_close(loss, definition, rtol=2**-7, atol=0.0, check_dtype=False)  # logits have 8 bits


@pytest.mark.parametrize("label", [-1, VOCABULARY])
def test_a_label_outside_the_vocabulary_is_no_silent_zero(label: int) -> None:
    h, weight, labels = draw(5)
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(h, weight, labels)


WRONG = {
    "hidden": ((5, 7), (11, 6), (5,)),
    "batch": ((1, 5, 6), (11, 6), (5,)),
    "weight": ((5, 6), (6,), (5,)),
    "labels": ((5, 6), (11, 6), (4,)),
}


@pytest.mark.parametrize("shapes", WRONG.values(), ids=WRONG)
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], ...]) -> None:
    h, weight, labels = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"hidden must be \[T, D\], weight \[C, D\] and labels \[T\]") as error:
        linear_cross_entropy(h, weight, labels.long())
    assert ", ".join(str(list(shape)) for shape in shapes) in str(error.value)
