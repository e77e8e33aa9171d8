"""`python -m genkit COMMAND ...` does the same as `genkit COMMAND ...`."""

from genkit.cli.main import run

if __name__ == "__main__":
    run()
