"""Networks that no library has and that people have weights for, or need none for."""
