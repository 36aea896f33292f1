"""Everything a site runs: its data, DP training, head and store."""
