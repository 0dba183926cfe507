"""Tests, and programs that they start."""

from tests.helpers import settings

settings.apply()
