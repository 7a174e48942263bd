"""Each benchmark prints a table and appends rows to benchmarks/results/."""
