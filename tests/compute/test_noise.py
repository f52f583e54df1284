"""NEFTune's noise against its formula, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.compute.layout import lay_out_pairs, lay_out_samples
from finetune.model.load import load_model
from finetune.model.runtime import paddle as bring_up

ALPHA = 5.0


@pytest.fixture(scope="module")
def model(tiny_folder):
    from finetune.compute.noise import set_noise

    model = load_model(tiny_folder, training=True).model
    set_noise(model, ALPHA)
    return model


def noise(model, layout, seed: int = 0) -> np.ndarray:
    """What is added, [T, hidden]."""
    from finetune.compute.noise import noisy_embeddings
    from finetune.model.build import body_of

    paddle = bring_up()
    paddle.seed(seed)
    plain = body_of(model).embed_tokens(paddle.to_tensor(layout.input_ids))
    return (noisy_embeddings(model, layout) - plain)[0].numpy()


def test_each_sequence_has_the_reach_of_its_own_length(model):
    short, long = np.arange(20), np.arange(300)
    found = noise(model, lay_out_samples([(short, short), (long, long)]))
    for rows, length in ((found[:20], 20), (found[20:], 300)):
        reach = ALPHA / np.sqrt(length * rows.shape[1])
        assert 0.97 * reach < np.abs(rows).max() < reach + 1e-6  # the sum with an embedding rounds
        assert np.std(rows) == pytest.approx(reach / np.sqrt(3), rel=0.05)
        assert abs(np.mean(rows)) < 0.1 * reach


def test_the_draws_are_those_of_the_seed(model):
    layout = lay_out_pairs([(np.arange(9), (np.arange(4), np.arange(4)), (np.arange(6), np.arange(6)))])
    np.testing.assert_array_equal(noise(model, layout), noise(model, layout))
    assert np.abs(noise(model, layout) - noise(model, layout, seed=1)).max() > 1e-3


def test_no_noise_in_evaluation_nor_without_gradients(model):
    from finetune.compute.noise import noisy_embeddings

    layout = lay_out_samples([(np.arange(5), np.arange(5))])
    with bring_up().no_grad():
        assert noisy_embeddings(model, layout) is None
    model.eval()
    try:
        assert noisy_embeddings(model, layout) is None
    finally:
        model.train()
