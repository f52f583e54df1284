"""Where predictions are read, who may attend to whom, and where positions restart."""

from __future__ import annotations

import numpy as np

from finetune.compute.layout import Span, lay_out_pairs, lay_out_samples


def sample(*tokens: int, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(tokens)
    labels = ids.copy()
    labels[:prompt] = -100
    return ids, labels


def both(*tokens: int) -> tuple[np.ndarray, np.ndarray]:
    return sample(*tokens, prompt=0)


def test_samples_lie_end_to_end_without_padding_and_restart_their_positions():
    layout = lay_out_samples([sample(5, 6, 7, 8, prompt=2), sample(9, 10, prompt=1)])
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert layout.spans == [Span(0, 4), Span(4, 6)]
    assert layout.predict_index.tolist() == [1, 2, 4]
    assert layout.targets.tolist() == [7, 8, 10]
    assert layout.owners.tolist() == [0, 0, 1]
    assert (layout.num_tokens, layout.num_targets, layout.num_owners) == (6, 3, 2)


def test_the_first_token_of_a_sample_is_never_scored_even_if_labelled():
    layout = lay_out_samples([sample(5, 6, prompt=0), sample(7, 8, prompt=0)])
    assert layout.targets.tolist() == [6, 8]
    assert layout.predict_index.tolist() == [0, 2]


def test_a_pair_shares_its_prompt_and_each_response_starts_from_the_prompts_last_token():
    layout = lay_out_pairs([([1, 2], both(3, 4), both(5, 6, 7))])
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert layout.spans == [Span(0, 2), Span(2, 4, (0, 2)), Span(4, 7, (0, 2))]
    assert layout.predict_index.tolist() == [1, 2, 1, 4, 5]
    assert layout.targets.tolist() == [3, 4, 5, 6, 7]
    assert layout.owners.tolist() == [0, 0, 1, 1, 1]


def test_several_pairs_keep_to_themselves():
    layout = lay_out_pairs([([1], both(2), both(3)), ([4], both(5), both(6))])
    assert [span.prefix for span in layout.spans] == [None, (0, 1), (0, 1), None, (3, 4), (3, 4)]
    assert layout.owners.tolist() == [0, 1, 2, 3]
    assert layout.predict_index.tolist() == [0, 0, 3, 3]


def test_unscored_tokens_of_a_response_are_seen_but_not_scored():
    layout = lay_out_pairs([([1], (np.array([2, 3, 4]), np.array([2, -100, 4])), both(5))])
    assert layout.targets.tolist() == [2, 4, 5]
    assert layout.predict_index.tolist() == [0, 2, 0]
