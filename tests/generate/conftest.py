"""Generation with programs that compile three times faster."""

import jax
import pytest

from meetjax.generate import decode
from tests.conftest import QUICK


@pytest.fixture(autouse=True, scope="package")
def quick_programs():
    """The same programs under other compiler options."""
    first = jax.jit(decode.first_token.__wrapped__, static_argnums=(0, 5), compiler_options=QUICK)
    following = jax.jit(decode.next_token.__wrapped__, static_argnums=0, donate_argnums=2, compiler_options=QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "first_token", first)
        patch.setattr(decode, "next_token", following)
        yield
