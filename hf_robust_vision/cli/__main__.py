"""`python -m hf_robust_vision.cli`, as launchers start it."""

import sys

from . import main


sys.exit(main())
