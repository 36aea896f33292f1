"""What a federation left behind, in the formats that others read."""
