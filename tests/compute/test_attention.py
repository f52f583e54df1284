"""Span attention against PaddleNLP's own forward of each sequence alone, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.compute.layout import lay_out_pairs, lay_out_samples
from finetune.model.load import load_model
from finetune.model.runtime import paddle as bring_up


def ids(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 400, length)


def alone(model, sequences: list[np.ndarray], scored_from: list[int]):
    """Log-probabilities by PaddleNLP's forward, its own mask and attention, one sequence a call."""
    paddle = bring_up()
    out = []
    for tokens, start in zip(sequences, scored_from):
        logits = model(input_ids=paddle.to_tensor(tokens[None]))[0][0].astype("float64")
        logps = paddle.nn.functional.log_softmax(logits, axis=-1)
        out += [logps[i - 1, int(tokens[i])] for i in range(start, len(tokens))]
    return paddle.stack(out)


def compare(folder, layout, sequences, scored_from):
    paddle = bring_up()
    from finetune.compute.forward import token_logps

    reference, ours = (load_model(folder, training=True).model for _ in range(2))
    want = alone(reference, sequences, scored_from)
    got = token_logps(ours, layout)
    scale = paddle.to_tensor(np.random.default_rng(3).standard_normal(len(want)))
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=2e-5)
    (want * scale).sum().backward()
    (got * scale.astype("float32")).sum().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        np.testing.assert_allclose(
            parameter.grad.numpy(), theirs[name].grad.numpy(), atol=2e-4, rtol=2e-4, err_msg=name
        )


@pytest.fixture(params=[{}, {"QUERIES": 7}, {"KEPT_ATTENTION_BYTES": 0}], ids=["as it is", "short blocks", "none kept"])
def _blocks(request, monkeypatch):
    bring_up()
    from finetune.compute import attention

    for name, value in request.param.items():
        monkeypatch.setattr(attention, name, value)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("fixture", ["tiny_folder", "tiny_untied_folder"])
def test_samples_of_a_row_are_as_if_alone(fixture, request):
    sequences, scored_from = [ids(0, 9), ids(1, 300), ids(2, 2)], [4, 30, 1]
    samples = []
    for tokens, start in zip(sequences, scored_from):
        labels = tokens.copy()
        labels[:start] = -100
        samples.append((tokens, labels))
    compare(request.getfixturevalue(fixture), lay_out_samples(samples), sequences, scored_from)


@pytest.mark.usefixtures("_blocks")
def test_responses_of_a_pair_are_as_if_each_had_the_prompt_to_itself(tiny_folder):
    prompts, chosen, rejected = [ids(0, 5), ids(1, 33)], [ids(2, 7), ids(3, 1)], [ids(4, 140), ids(5, 3)]
    layout = lay_out_pairs([(p, (c, c), (r, r)) for p, c, r in zip(prompts, chosen, rejected)])
    sequences, scored_from = [], []
    for p, c, r in zip(prompts, chosen, rejected):
        sequences += [np.concatenate([p, c]), np.concatenate([p, r])]
        scored_from += [len(p), len(p)]
    compare(tiny_folder, layout, sequences, scored_from)


def test_a_model_set_up_for_spans_refuses_to_be_called_without(tiny_folder):
    paddle = bring_up()
    from finetune.compute.layers import prepare_layers

    model = load_model(tiny_folder).model
    prepare_layers(model)
    with pytest.raises(ValueError, match="load it again"):
        model(input_ids=paddle.ones([1, 4], dtype="int64"))


@pytest.mark.parametrize("limit", [2**20, 0], ids=["weights kept", "none kept"])
def test_all_that_is_kept_for_the_backward_pass_can_be_dropped(limit, monkeypatch):
    """Recompute drops what it sees through saved_tensors_hooks; what an attribute holds would stay."""
    paddle = bring_up()
    from finetune.compute import attention
    from finetune.compute.layout import Span

    monkeypatch.setattr(attention, "KEPT_ATTENTION_BYTES", limit)
    draw = np.random.default_rng(6).standard_normal
    inputs = [paddle.to_tensor(draw((10, heads, 8)).astype(np.float32)) for heads in (4, 2, 2)]
    for tensor in inputs:
        tensor.stop_gradient = False
    angles = draw((10, 4)).astype(np.float32)
    context = attention.Context([Span(0, 7), Span(7, 10)], np.cos(angles), np.sin(angles))
    kept = []
    with paddle.autograd.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda dropped: dropped):
        attention.attend(*inputs, context)
    weights = [(2, 2 * 7, 7), (2, 2 * 3, 3)] if limit else []
    assert kept == [(4, 10, 8), (2, 10, 8), (2, 10, 8), *weights]
