"""What the tuners are made of.

PEFT comes first, here: importing it brings the tuners along, and they must find these modules whole.
"""

import peft as _peft  # noqa: F401
