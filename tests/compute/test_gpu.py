"""The wiring of fused GPU kernels, without a GPU: what Paddle's documentation says of a kernel stands in for it."""

from __future__ import annotations

import numpy as np
import pytest

from finetune import console
from finetune.compute import cpu, gpu
from finetune.compute.layout import Span, lay_out_pairs, lay_out_samples, visible_until
from finetune.model.load import load_model
from finetune.model.runtime import paddle as bring_up

A100, T4, H100, RTX_4090 = (8, 0), (7, 5), (9, 0), (8, 9)
CHOICES = [
    # device, capability, dtype, head_dim -> flashmask, rotary, rms_norm
    ("cpu", (0, 0), "float32", 64, False, False, False),
    ("cpu", (0, 0), "bfloat16", 64, False, False, False),
    ("xpu:0", (0, 0), "bfloat16", 64, False, False, False),
    ("gpu:0", A100, "bfloat16", 64, True, True, True),
    ("gpu:0", A100, "bfloat16", 128, True, True, True),
    ("gpu:3", H100, "float16", 128, True, True, True),
    ("gpu:0", RTX_4090, "bfloat16", 192, True, True, True),
    ("gpu:0", RTX_4090, "bfloat16", 256, False, True, True),
    ("gpu:0", A100, "bfloat16", 44, False, True, True),
    ("gpu:0", T4, "float16", 64, False, True, True),
    ("gpu:0", A100, "float32", 64, False, True, True),
    ("gpu:0", A100, "float64", 64, False, False, False),
]


@pytest.mark.parametrize("device, capability, dtype, head_dim, flashmask, rotary, rms_norm", CHOICES)
def test_what_applies_where(device, capability, dtype, head_dim, flashmask, rotary, rms_norm):
    found = [
        gpu.applies(kernel, device=device, capability=capability, dtype=dtype, head_dim=head_dim)
        for kernel in ("flashmask", "rotary", "rms_norm")
    ]
    assert found == [flashmask, rotary, rms_norm]


def ids(draw, least: int = 1) -> np.ndarray:
    return draw.integers(0, 400, draw.integers(least, 40))


def random_pack(draw):
    return lay_out_samples([(x, x) for x in (ids(draw) for _ in range(draw.integers(1, 6)))])


def random_pairs(draw):
    pairs = [(ids(draw), ids(draw), ids(draw)) for _ in range(draw.integers(1, 5))]
    return lay_out_pairs([(prompt, (chosen, chosen), (rejected, rejected)) for prompt, chosen, rejected in pairs])


def dense_mask(spans: list[Span]) -> np.ndarray:
    """Whether token i sees token j, bool [T, T], by the definition of a span."""
    size = spans[-1].stop
    mask = np.zeros((size, size), bool)
    for span in spans:
        for i in range(span.start, span.stop):
            mask[i, span.start : i + 1] = True
            if span.prefix:
                mask[i, span.prefix[0] : span.prefix[1]] = True
    return mask


def documented_mask(start_rows: np.ndarray) -> np.ndarray:
    """What FlashMask leaves visible with causal=True and one bound per column, bool [T, T].

    As `flashmask_to_densemask` in the documentation of paddle.nn.functional.flashmask_attention (3.3), whose `:j`
    hides what lies above the diagonal: column j is hidden from row start_rows[j] on and above row j.
    """
    size = len(start_rows)
    mask = np.ones((size, size), bool)
    for j in range(size):
        mask[start_rows[j] :, j] = False
        mask[:j, j] = False
    return mask


@pytest.mark.parametrize("make", [random_pack, random_pairs])
def test_flashmask_rows_say_what_the_spans_say(make):
    draw = np.random.default_rng(0)
    for _ in range(50):
        spans = make(draw).spans
        np.testing.assert_array_equal(documented_mask(visible_until(spans)), dense_mask(spans))


def test_rows_of_the_documentations_examples():
    documents = [Span(0, 4), Span(4, 7), Span(7, 10)]
    assert visible_until(documents).tolist() == [4, 4, 4, 4, 7, 7, 7, 10, 10, 10]
    shared_question = [Span(0, 4), Span(4, 7, (0, 4)), Span(7, 10, (0, 4))]
    assert visible_until(shared_question).tolist() == [10, 10, 10, 10, 7, 7, 7, 10, 10, 10]


# -- kernels as documented -----------------------------------------------------------------------------------------


def documented_flashmask(query, key, value, startend_row_indices, *, causal):
    """[1, T, heads, D], key and value [1, T, kv_heads, D], int32 [1, 1, T, 1] -> [1, T, heads, D]."""
    paddle = bring_up()
    assert causal and startend_row_indices.dtype == paddle.int32
    assert startend_row_indices.shape == [1, 1, key.shape[1], 1]
    group = query.shape[2] // key.shape[2]
    q, k, v = (x[0].transpose([1, 0, 2]) for x in (query, key, value))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    visible = paddle.to_tensor(documented_mask(startend_row_indices.numpy().reshape(-1)))
    scores = paddle.where(visible, q @ k.transpose([0, 2, 1]) * q.shape[2] ** -0.5, paddle.to_tensor(-np.inf))
    return (paddle.nn.functional.softmax(scores, -1) @ v).transpose([1, 0, 2])[None]


def documented_rotary(q, k, v, *, sin, cos, use_neox_rotary_style):
    """[1, T, heads, D] and sin, cos [1, T, 1, D]; the halves of a head are turned against one another."""
    paddle = bring_up()
    assert v is None and not use_neox_rotary_style and sin.shape == [1, q.shape[1], 1, q.shape[3]]

    def turned(x):
        left, right = x.chunk(2, axis=-1)
        return x * cos + paddle.concat([-right, left], axis=-1) * sin

    return turned(q), turned(k), None


def documented_rms_norm(input, normalized_shape, weight, eps):
    inverse = bring_up().rsqrt(input.square().mean(-1, keepdim=True) + eps)
    assert normalized_shape == [input.shape[-1]]
    return input * inverse * weight, inverse


@pytest.fixture
def kernels(monkeypatch):
    """A machine whose GPU has these kernels; the names of those called."""
    paddle = bring_up()
    from finetune.compute import attention

    called = set()

    def counted(name, function):
        def run(*args, **options):
            called.add(name)
            return function(*args, **options)

        return run

    monkeypatch.setattr(cpu, "fits", lambda *tensors: False)
    monkeypatch.setattr(gpu, "device", lambda: "gpu:0")
    monkeypatch.setattr(gpu, "applies", lambda kernel, **place: True)  # float32, where Paddle has CPU kernels
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: A100)
    functional = paddle.nn.functional
    monkeypatch.setattr(functional, "flashmask_attention", counted("flashmask", documented_flashmask))
    monkeypatch.setattr(functional, "rms_norm", counted("rms_norm", documented_rms_norm))
    monkeypatch.setattr(attention, "fused_rotary_position_embedding", counted("rotary", documented_rotary))
    monkeypatch.setattr(console, "_warned", set())  # a warning is given once
    gpu.chosen.cache_clear()
    yield called
    gpu.chosen.cache_clear()


def nll_and_gradients(folder, layout):
    from finetune.compute.forward import total_nll

    model = load_model(folder, training=True).model
    loss = total_nll(model, layout)
    loss.backward()
    return float(loss), {name: p.grad.numpy() for name, p in model.named_parameters()}


def assert_same(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, atol=2e-4 * np.abs(value).max(), err_msg=name)


@pytest.fixture(params=[random_pack, random_pairs])
def layout(request):
    return request.param(np.random.default_rng(4))


@pytest.fixture
def on_cpu(tiny_folder, layout):
    """Asked for before `kernels`: what the CPU path gives."""
    return nll_and_gradients(tiny_folder, layout)


def test_fused_kernels_give_what_the_cpu_gives(on_cpu, kernels, tiny_folder, layout, capsys):
    assert_same(nll_and_gradients(tiny_folder, layout), on_cpu)
    assert kernels == {"flashmask", "rotary", "rms_norm"}
    assert "left out" not in capsys.readouterr().err


def test_kernels_that_fail_or_differ_are_left_out(on_cpu, kernels, tiny_folder, layout, monkeypatch, capsys):
    paddle = bring_up()

    def missing(*args, **options):
        raise RuntimeError("(NotFound) The kernel is not registered.")

    def blind(query, key, value, startend_row_indices, *, causal):
        everything = paddle.full_like(startend_row_indices, key.shape[1])
        return documented_flashmask(query, key, value, everything, causal=True)

    monkeypatch.setattr(paddle.nn.functional, "rms_norm", missing)
    monkeypatch.setattr(paddle.nn.functional, "flashmask_attention", blind)
    assert_same(nll_and_gradients(tiny_folder, layout), on_cpu)
    said = capsys.readouterr().err
    assert "rms_norm is left out on gpu:0: RuntimeError" in said and "not registered" in said
    assert "flashmask is left out on gpu:0: off by" in said
    assert "rotary" not in said


def test_attention_dropout_is_not_given_to_flashmask(kernels):
    from finetune.compute.attention import Context, attend

    paddle = bring_up()
    spans = [Span(0, 6)]
    query, key, value = (paddle.ones([6, heads, 8]) for heads in (4, 2, 2))
    angles = np.zeros((6, 4), np.float32)
    attend(query, key, value, Context(spans, np.cos(angles), np.sin(angles)), dropout=0.5)
    assert kernels == {"rotary"}
