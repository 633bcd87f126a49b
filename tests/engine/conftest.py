from __future__ import annotations

import pytest

from tests.zygote import Zygote, shared_zygote


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    return shared_zygote()
