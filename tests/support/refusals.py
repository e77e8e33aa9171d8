"""What a call is refused with."""

import pytest


def refuses(call, *words):
    """``ValueError`` of one line, in which these words are."""
    with pytest.raises(ValueError) as e:  # noqa: PT011
        call()
    assert all(w in str(e.value) for w in words), str(e.value)
    assert "\n" not in str(e.value)
