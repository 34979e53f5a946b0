"""``python -m nanochat_core``: the same as ``nanochat``, for torchrun."""

import sys

from nanochat_core.cli import main

sys.exit(main())
