"""The commands that need no ranks; :mod:`triloom.cli` dispatches to them."""
