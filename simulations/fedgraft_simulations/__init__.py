"""A whole federation on one machine: grids, partitions, comparisons, benchmarks."""
