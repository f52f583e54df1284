"""Where predictions are read, who may attend to whom, and where positions restart."""

from __future__ import annotations

import numpy as np

from finetune.train.layout import attention_mask, lay_out_pairs, lay_out_samples


def sample(*tokens: int, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(tokens)
    labels = ids.copy()
    labels[:prompt] = -100
    return ids, labels


def both(*tokens: int) -> tuple[np.ndarray, np.ndarray]:
    return sample(*tokens, prompt=0)


def test_one_sample_a_row_is_padded_on_the_right_and_needs_no_mask():
    layout = lay_out_samples([[sample(5, 6, 7, 8, prompt=2)], [sample(9, 10, prompt=1)]], pad_token_id=3)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 3, 3]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert layout.predict_index.tolist() == [1, 2, 4]
    assert layout.targets.tolist() == [7, 8, 10]
    assert layout.owners.tolist() == [0, 0, 1]
    assert (layout.num_tokens, layout.num_targets, layout.num_owners) == (6, 3, 2)
    assert attention_mask(layout) is None


def test_the_first_token_of_a_sample_is_never_scored_even_if_labelled():
    layout = lay_out_samples([[sample(5, 6, prompt=0), sample(7, 8, prompt=0)]], pad_token_id=0)
    assert layout.targets.tolist() == [6, 8]
    assert layout.predict_index.tolist() == [0, 2]


def test_packed_samples_restart_positions_and_do_not_see_each_other():
    layout = lay_out_samples([[sample(5, 6, prompt=1), sample(7, 8, prompt=1)], [sample(9, prompt=0)]], pad_token_id=0)
    assert layout.position_ids.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    mask = attention_mask(layout)
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0, 0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask.any(axis=-1).all(), "an empty softmax row would give NaN"


def test_a_pair_shares_its_prompt_and_each_response_starts_from_the_prompts_last_token():
    layout = lay_out_pairs([[([1, 2], both(3, 4), both(5, 6))]], pad_token_id=0)
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 2, 3]]
    assert layout.predict_index.tolist() == [1, 2, 1, 4]
    assert layout.targets.tolist() == [3, 4, 5, 6]
    assert layout.owners.tolist() == [0, 0, 1, 1]
    assert attention_mask(layout)[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_packed_pairs_keep_to_themselves():
    layout = lay_out_pairs([[([1], both(2), both(3)), ([4], both(5), both(6))]], pad_token_id=0)
    mask = attention_mask(layout)[0, 0]
    assert not mask[3:, :3].any()
    assert layout.owners.tolist() == [0, 1, 2, 3]
    assert layout.predict_index.tolist() == [0, 0, 3, 3]


def test_unscored_tokens_of_a_response_are_seen_but_not_scored():
    layout = lay_out_pairs([[([1], (np.array([2, 3, 4]), np.array([2, -100, 4])), both(5))]], pad_token_id=0)
    assert layout.targets.tolist() == [2, 4, 5]
    assert layout.predict_index.tolist() == [0, 2, 0]
