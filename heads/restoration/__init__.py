"""Degraded photographs made clean in one pass of a diffusion U-Net, and what such networks are trained on."""
