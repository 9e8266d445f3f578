from tests.support.hypothesis import register_profiles

register_profiles()
