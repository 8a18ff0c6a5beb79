"""`python -m mlpstorage`: the same as the `mlpstorage` command."""

from mlpstorage.main import entry

if __name__ == "__main__":
    entry()
