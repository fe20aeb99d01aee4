"""`python -m demur.cli`."""

import sys

from demur.cli import main

sys.exit(main())
