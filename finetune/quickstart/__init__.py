"""`make demo`: a small base model, its rows, and the numbers before and after."""
