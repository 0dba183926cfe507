"""What tests, and programs that they start, share: each thing once."""

from tests.helpers import settings

settings.apply()
