"""Every damage on every file of a checkpoint, through the command."""

from __future__ import annotations

import pytest

from tests.train.test_damage import DAMAGES, FILES, check, trained  # noqa: F401


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_said_in_one_line_and_the_checkpoint_before_is_used(trained, tmp_path, capsys, name, how):  # noqa: F811
    check(trained, tmp_path, capsys, name, how)
