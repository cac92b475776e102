"""The formulas of the data-free methods, as functions on tensors, and the table of the methods."""
