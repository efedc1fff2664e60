"""The pages of docs/measured/, made from rows."""
