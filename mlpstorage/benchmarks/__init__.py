"""The thin shell that scripts import: one class a benchmark."""
