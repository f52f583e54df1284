"""The fuzz tests of the suite with many more cases: FINETUNE_SOAK_EXAMPLES each, 1,200 when not set."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests import fuzzing  # noqa: F401, registers the profile

settings.load_profile("soak")  # before the tests are defined

from tests.model.test_fuzz import *  # noqa: F403
from tests.model.test_fuzz import test_adapter_configs as test_parsed_adapter_configs  # noqa: F401
from tests.recipe.test_fuzz import *  # noqa: F403
from tests.recipe.test_fuzz import test_overrides as test_parsed_overrides  # noqa: F401
from tests.test_fuzz import *  # noqa: F403
from tests.test_fuzz import no_sync, place  # noqa: F401

pytestmark = pytest.mark.timeout(0)
