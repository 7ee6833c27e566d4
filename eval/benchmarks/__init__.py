"""Claims of speed, measured: each module runs both sides in one process and prints the ratio."""
