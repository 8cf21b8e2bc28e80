"""`python -m offload_runtime` is `ds-offload`."""

from .cli import main

if __name__ == "__main__":
    main()
