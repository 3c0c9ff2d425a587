"""What is done after rounding so that the compressed layers compute nearly what the full ones do."""
