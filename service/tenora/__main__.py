"""`python -m tenora` is `tenora`."""

from tenora.cli import main

if __name__ == "__main__":
    main()
