"""How much hypothesis tries: the same examples in every run of the tests, and many more, new ones each time, by option.

`pytest --hypothesis-profile=deep` looks deeper.
"""

from typing import Final

from hypothesis import settings

DEEP_FACTOR: Final = 25


def register_profiles() -> None:
    """`default` is repeatable, so that a change is judged by what it changed. No deadlines: machines are shared."""
    settings.register_profile("default", deadline=None, derandomize=True)
    settings.register_profile("deep", deadline=None, max_examples=100 * DEEP_FACTOR, print_blob=True)
    settings.load_profile("default")


def examples(usual: int) -> int:
    """For a test that wants another number of examples than hypothesis' own 100: `usual`, or more by the profile."""
    return usual * settings().max_examples // 100
