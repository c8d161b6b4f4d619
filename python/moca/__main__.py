"""`python -m moca` is the `moca` command; `accelerate launch -m moca` runs it on more devices."""

import sys

from moca.cli import main

if __name__ == "__main__":
    sys.exit(main())
