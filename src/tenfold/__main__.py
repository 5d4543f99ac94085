"""`python -m tenfold`."""

from __future__ import annotations

import sys

from tenfold.cli import main

sys.exit(main())
