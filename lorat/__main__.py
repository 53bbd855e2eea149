"""`python -m lorat`, so that torchrun can start it."""

import sys

from .cli.main import main

sys.exit(main())
