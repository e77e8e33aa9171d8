"""`python -m genkit COMMAND ...` does the same as `genkit COMMAND ...`."""

import sys

from genkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
