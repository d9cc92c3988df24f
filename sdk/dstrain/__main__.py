"""`python -m dstrain` is the `dstrain` command."""

import sys

from dstrain.cli import main

sys.exit(main())
